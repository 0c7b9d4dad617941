"""Where the cached residual lives: `output` (whole transformer, latent space) or `blocks` (block stack, token space).

A site knows how to run a forward and take its residual, and how to run one with a residual in its place. All
else (which steps, which grid, which coefficients) is the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from erta.architectures import Architecture, BlockStack, architecture_of, at_rest, blocks_of, latent_of, raw_latent
from erta.errors import InstallError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Parts:
    """What a transformer gave: the velocity as one tensor, and what else there was, which reused steps repeat as it is."""

    velocity: torch.Tensor
    beside: torch.Tensor | None = None


class _OnTransformer:
    """What both sites know of a transformer: the form of its output."""

    architecture: Architecture

    def latent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What the output answers to, of a call with these arguments: without tokens of references before it."""
        name, x = self.architecture.references_before, latent_of(args, kwargs)
        if name is None:
            return x
        references = kwargs.get(name) or 0
        return x[:, references:] if references else x

    def velocity_of(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The first of the parts."""
        first = output[0]
        plain = self.architecture.beside_velocity is None and isinstance(first, torch.Tensor)
        return first if plain else self.parts(output, args, kwargs).velocity

    def parts(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
        """The parts of an output to a call with these arguments."""
        first = output[0]
        velocity = torch.stack(first) if isinstance(first, list) else first
        beside = self.architecture.beside_velocity
        if beside is None:
            return Parts(velocity)
        if beside == "output":
            return Parts(velocity, output[1])
        axis = self.architecture.channel_axis_of(velocity)
        if velocity.shape[axis] == 2 * self.latent(args, kwargs).shape[axis]:
            return Parts(*velocity.chunk(2, axis))
        return Parts(velocity)

    def answer(self, velocity: torch.Tensor, beside: torch.Tensor | None, args: tuple[Any, ...], kwargs: Any) -> Any:
        """An output of the form that these arguments ask for."""
        sample: Any = velocity
        if beside is not None and self.architecture.beside_velocity == "channels":
            sample = torch.cat([velocity, beside], self.architecture.channel_axis_of(velocity))
        if isinstance(raw_latent(args, kwargs), list):
            sample = list(velocity.unbind())
        if self.architecture.beside_velocity == "output":
            return _answer_of_two(sample, beside, kwargs)
        return Transformer2DModelOutput(sample=sample) if kwargs.get("return_dict", True) else (sample,)


def _answer_of_two(sample: torch.Tensor, beside: Any, kwargs: dict[str, Any]) -> Any:
    if not kwargs.get("return_dict", True):
        return sample, beside
    raise InstallError(
        "a transformer with two outputs can be cached where its pipeline asks for return_dict=False only"
    )


class OutputSite(_OnTransformer):
    """The paper's residual, `r = v - x` of the whole transformer; a reused step runs nothing and returns `x + r`.

    With `reuse="velocity"` the velocity itself is kept and returned.
    """

    name = "output"

    def __init__(self, architecture: Architecture, reuse: str = "residual") -> None:
        self.architecture, self.reuse = architecture, reuse

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """The model's output as it is, and what to keep of it."""
        output = forward(*args, **kwargs)
        velocity = self.velocity_of(output, args, kwargs)
        if self.reuse == "velocity":
            return output, velocity
        return output, velocity - like_output(self.latent(args, kwargs), velocity, self.architecture)

    def predict(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], kept: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at this input with what was kept of an earlier step."""
        return (
            kept if self.reuse == "velocity" else like_output(self.latent(args, kwargs), kept, self.architecture) + kept
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


class BlocksSite(_OnTransformer):
    """Residual of the block stack, tokens after it minus tokens before it (as TeaCache-like code keeps it).

    A reused step runs the embeddings, adds the residual in place of the blocks, and runs the time-dependent
    head. Blocks are not hooked, so compiled ones stay as they are: a shallow copy of the transformer has another stack, which
    no other thread's forward sees. Only where somebody wrapped the transformer's forward (accelerate's offload) the stack is
    exchanged for the length of a call.

    Raises InstallError for a transformer whose blocks are not known.
    """

    name = "blocks"

    def __init__(self, transformer: nn.Module) -> None:
        self.stack = stack = blocks_of(transformer, "site=blocks", "use site=output, or ")
        self.transformer, self.architecture = transformer, architecture_of(transformer)
        self.before, self.after, self.instead = (_Stand(stack) for _ in range(3))
        with at_rest(transformer):
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
        output = self.run(self.watched, forward, args, kwargs)
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
            return self.run(self.replaced, forward, args, kwargs)[0]
        finally:
            self.instead.shift = self.instead.tokens = None

    def run(self, lists: dict[str, nn.ModuleList], forward: Forward, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The transformer's forward with other lists of blocks."""
        clock = getattr(forward, "around", None)
        own: Any = forward.forward if clock is not None else forward  # type: ignore[attr-defined]
        if getattr(own, "__self__", None) is self.transformer:
            copied = MethodType(own.__func__, self._with(lists))
            return (copied if clock is None else clock(copied))(*args, **kwargs)
        with self._stack(lists):
            return forward(*args, **kwargs)

    def _with(self, lists: dict[str, nn.ModuleList]) -> nn.Module:
        """A shallow copy of the transformer: its parameters and modules, but for these lists."""
        copied = object.__new__(type(self.transformer))
        copied.__dict__.update(self.transformer.__dict__)
        copied.__dict__["_modules"] = {**self.transformer._modules, **lists}
        return copied

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
    """The site called `name`, one of `erta.options.SITES`. Raises InstallError at `blocks` for a transformer whose blocks are not known."""
    return OutputSite(architecture_of(transformer), reuse) if name == "output" else BlocksSite(transformer)


def like_output(x: torch.Tensor, velocity: torch.Tensor, architecture: Architecture) -> torch.Tensor:
    """The part of the input that the output answers to: its first channels (image-to-video appends others).

    Raises InstallError where the output has no such part of the input, so that no residual can be taken.
    """
    axis = architecture.channel_axis_of(velocity)
    has_more = x.ndim == velocity.ndim and x.shape[axis] > velocity.shape[axis]
    like = x.narrow(axis, 0, velocity.shape[axis]) if has_more else x
    if like.shape != velocity.shape:
        raise InstallError(
            f"{architecture.name} answers an input of {tuple(x.shape)} with {tuple(velocity.shape)}, so that it is not known "
            "which part of it is the velocity: add an entry to erta/architectures.py"
        )
    return like
