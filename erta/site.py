"""Where the cached residual lives: `output` (whole transformer, latent space) or `blocks` (block stack, token space).

A site knows how to run a forward and take its residual, and how to run one with a residual in its place. All
else (which steps, which grid, which coefficients) is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError

SITES = ("output", "blocks")
CHANNEL_AXIS = {"CogVideoXTransformer3DModel": 2}  # (b, frames, channels, height, width)
Forward = Callable[..., Any]


class OutputSite:
    """The paper's formula: `r = v - x` of the whole transformer; a reused step runs nothing and returns `x + r`.

    With `reuse="velocity"` the velocity itself is kept and returned.
    """

    name = "output"

    def __init__(self, model: str, reuse: str = "residual") -> None:
        self.model, self.reuse = model, reuse

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The model's output as it is, and what to keep of it."""
        output = forward(*args, **kwargs)
        velocity = output[0]
        kept = (
            velocity
            if self.reuse == "velocity"
            else velocity - like_output(latent_of(args, kwargs), velocity, self.model)
        )
        return output, kept

    def predict(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at this input with what was kept of an earlier step."""
        return kept if self.reuse == "velocity" else like_output(latent_of(args, kwargs), kept, self.model) + kept


@dataclass(frozen=True)
class BlockStack:
    """Where a transformer keeps its blocks: attribute names in order, and which output holds the image tokens.

    `output_index` is None if a block returns the tokens alone, else their place in the pair that it returns,
    whose other member are the text tokens.
    """

    lists: tuple[str, ...]
    output_index: int | None


CONTROLS = ("controlnet_block_samples", "controlnet_single_block_samples")
BLOCK_STACKS = {
    "WanTransformer3DModel": BlockStack(("blocks",), None),
    "FluxTransformer2DModel": BlockStack(("transformer_blocks", "single_transformer_blocks"), 1),
}


class _Stand(nn.Module):
    """Stands in the block stack with a block's arguments and results; notes the tokens, or shifts them."""

    def __init__(self, output_index: int | None) -> None:
        super().__init__()
        self.output_index = output_index
        self.tokens: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = latent_of(args, kwargs)
        self.tokens = tokens
        if self.shift is not None:
            tokens = tokens + self.shift
        if self.output_index is None:
            return tokens
        text = text_of(args, kwargs)
        return (text, tokens) if self.output_index == 1 else (tokens, text)


class BlocksSite:
    """Residual of the block stack, tokens after it minus tokens before it (as TeaCache-like code keeps it).

    A reused step runs the embeddings, adds the residual in place of the blocks, and runs the time-dependent
    head. Blocks are not hooked: the stack is exchanged for the length of a call, so compiled blocks stay as
    they are.

    Raises InstallError for a transformer whose blocks are not known.
    """

    name = "blocks"

    def __init__(self, transformer: nn.Module) -> None:
        stack = BLOCK_STACKS.get(model_name(transformer))
        if stack is None:
            raise InstallError(
                f"site=blocks does not know the blocks of {model_name(transformer)} (it knows "
                f"{', '.join(BLOCK_STACKS)}): use site=output, which works on every transformer"
            )
        self.transformer = transformer
        self.before, self.after, self.instead = (_Stand(stack.output_index) for _ in range(3))
        blocks = [list(transformer.get_submodule(name)) for name in stack.lists]
        blocks[0].insert(0, self.before)
        blocks[-1].append(self.after)
        self.watched = {name: nn.ModuleList(items) for name, items in zip(stack.lists, blocks, strict=True)}
        self.replaced = {name: nn.ModuleList() for name in stack.lists}
        self.replaced[stack.lists[0]].append(self.instead)

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The model's output as it is, and the residual of its block stack, (batch, tokens, width)."""
        if any(kwargs.get(name) is not None for name in CONTROLS):
            raise InstallError("a ControlNet adds to single blocks, which site=blocks exchanges: use site=output")
        with self._stack(self.watched):
            output = forward(*args, **kwargs)
        assert self.before.tokens is not None and self.after.tokens is not None
        residual = self.after.tokens - self.before.tokens
        self.before.tokens = self.after.tokens = None
        return output, residual

    def predict(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at this input with an earlier step's residual in place of the blocks."""
        self.instead.shift = kept
        try:
            with self._stack(self.replaced):
                return forward(*args, **kwargs)[0]
        finally:
            self.instead.shift = self.instead.tokens = None

    @contextmanager
    def _stack(self, lists: dict[str, nn.ModuleList]) -> Iterator[None]:
        modules = self.transformer._modules
        own = {name: modules[name] for name in lists}
        modules.update(lists)
        try:
            yield
        finally:
            modules.update(own)


Site = OutputSite | BlocksSite


def make_site(name: str, transformer: nn.Module, reuse: str = "residual") -> Site:
    """The site called `name`, one of `SITES`."""
    return OutputSite(model_name(transformer), reuse) if name == "output" else BlocksSite(transformer)


def text_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The text tokens among the arguments of a block."""
    return kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]


def latent_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The latent (or the tokens) that a module was called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def model_name(transformer: nn.Module) -> str:
    """Class name of a transformer."""
    return type(transformer).__name__


def channel_axis(latent: torch.Tensor, model: str) -> int:
    """The channel axis of a model's latent: the last one for packed tokens (b, n, c) as in FLUX, else mostly 1."""
    return latent.ndim - 1 if latent.ndim == 3 else CHANNEL_AXIS.get(model, 1)


def like_output(x: torch.Tensor, velocity: torch.Tensor, model: str) -> torch.Tensor:
    """The part of the input that the output answers to: its first channels (image-to-video appends others)."""
    axis = channel_axis(velocity, model)
    return x if x.shape[axis] == velocity.shape[axis] else x.narrow(axis, 0, velocity.shape[axis])
