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

from erta.architectures import Architecture, BlockStack, architecture_of, blocks_of, latent_of
from erta.errors import InstallError

SITES = ("output", "blocks")
Forward = Callable[..., Any]


class OutputSite:
    """The paper's residual, `r = v - x` of the whole transformer; a reused step runs nothing and returns `x + r`.

    With `reuse="velocity"` the velocity itself is kept and returned.
    """

    name = "output"

    def __init__(self, architecture: Architecture, reuse: str = "residual") -> None:
        self.architecture, self.reuse = architecture, reuse

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The model's output as it is, and what to keep of it."""
        output = forward(*args, **kwargs)
        velocity = output[0]
        kept = (
            velocity
            if self.reuse == "velocity"
            else velocity - like_output(latent_of(args, kwargs), velocity, self.architecture)
        )
        return output, kept

    def predict(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at this input with what was kept of an earlier step."""
        return (
            kept if self.reuse == "velocity" else like_output(latent_of(args, kwargs), kept, self.architecture) + kept
        )


class _Stand(nn.Module):
    """Stands in the block stack with a block's arguments and results; notes the tokens, or shifts them."""

    def __init__(self, stack: BlockStack) -> None:
        super().__init__()
        self.stack = stack
        self.tokens: torch.Tensor | None = None
        self.shift: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = latent_of(args, kwargs)
        self.tokens = tokens
        if self.shift is not None:
            tokens = tokens + self.shift
        if self.stack.output_index is None:
            return tokens
        streams = self.stack.streams(args, kwargs)
        streams[self.stack.output_index] = tokens
        return tuple(streams)


class BlocksSite:
    """Residual of the block stack, tokens after it minus tokens before it (as TeaCache-like code keeps it).

    A reused step runs the embeddings, adds the residual in place of the blocks, and runs the time-dependent
    head. Blocks are not hooked: the stack is exchanged for the length of a call, so compiled blocks stay as
    they are.

    Raises InstallError for a transformer whose blocks are not known.
    """

    name = "blocks"

    def __init__(self, transformer: nn.Module) -> None:
        self.stack = stack = blocks_of(transformer, "site=blocks", "use site=output, or ")
        self.transformer = transformer
        self.before, self.after, self.instead = (_Stand(stack) for _ in range(3))
        blocks = [list(transformer.get_submodule(name)) for name in stack.lists]
        blocks[0].insert(0, self.before)
        blocks[-1].append(self.after)
        self.watched = {name: nn.ModuleList(items) for name, items in zip(stack.lists, blocks, strict=True)}
        self.replaced = {name: nn.ModuleList() for name in stack.lists}
        self.replaced[stack.lists[0]].append(self.instead)

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The model's output as it is, and the residual of its block stack, (batch, tokens, width)."""
        if any(kwargs.get(name) is not None for name in self.stack.controls):
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


@dataclass(frozen=True)
class SeenForward:
    """One forward of an uncached run, and what a site would have made of it, as an observer sees it.

    Attributes:
        step, branch: the scheduler's step, and the pipeline's cache context (a guidance branch, or both in one batch).
        x, velocity: the latent that the transformer was given, and its output.
        residual: what a site would keep of it.
        predict: the velocity at this very input with the residual of an earlier step.
        stage: 1 in a pipeline's second transformer, else 0.
    """

    step: int
    branch: str
    x: torch.Tensor
    velocity: torch.Tensor
    residual: torch.Tensor
    predict: Callable[[torch.Tensor], torch.Tensor]
    stage: int = 0


Site = OutputSite | BlocksSite


def make_site(name: str, transformer: nn.Module, reuse: str = "residual") -> Site:
    """The site called `name`, one of `SITES`.

    Raises InstallError for a transformer whose output holds more than the velocity, and at `blocks` for unknown blocks.
    """
    architecture = architecture_of(transformer)
    if architecture.beside_velocity is not None:
        raise InstallError(
            f"the output of {architecture.name} holds {architecture.beside_velocity} beside the velocity, which a reused "
            "step cannot give: this pipeline cannot be cached"
        )
    return OutputSite(architecture, reuse) if name == "output" else BlocksSite(transformer)


def like_output(x: torch.Tensor, velocity: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """The part of the input that the output answers to: its first channels (image-to-video appends others)."""
    axis = architecture.channel_axis_of(velocity)
    return x if x.shape[axis] == velocity.shape[axis] else x.narrow(axis, 0, velocity.shape[axis])
