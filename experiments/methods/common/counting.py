"""Caches that diffusers ships, put on by `enable_cache`, with what they really compute counted.

diffusers' hooks replace the forward of blocks, of attention modules or of single layers, so a module that is called may
compute nothing. What is counted are the matrix layers whose own forward runs, below all hooks, each with its share of a
forward's FLOPs; the sum is in *forward equivalents*: 1 for a whole forward. A cache that matches no module, or reuses
nothing, is found out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import StateManager
from torch import nn

from erta.architectures import HOOK_NAME, latent_of
from erta.attachment import ContextHook
from erta.errors import InstallError
from erta.online import OnlineTrace, tensors_in
from erta.pipeline import Session, check_bare, single_denoiser
from erta.scheduler import counting, step_index

COUNTER = "erta_counter"
WHOLE = 1 - 1e-6  # of a forward
State = Callable[[], Any]  # what a cache keeps: tensors, nested


@dataclass
class CountedTrace(OnlineTrace):
    """`shares` holds, by cache context, what part of a forward was computed at each step."""

    shares: dict[str, list[float]] = field(default_factory=dict)

    @property
    def forwards(self) -> dict[str, float]:
        """Forward equivalents of the last call, by cache context."""
        return {branch: sum(shares) for branch, shares in self.shares.items()}

    def begin(self) -> None:
        super().begin()
        self.shares = {}

    def note(self, branch: str, step: int, share: float) -> None:
        """Note a forward of which `share` was computed."""
        self.shares.setdefault(branch, []).append(share)
        self.executed.setdefault(branch, []).append((step, share > WHOLE))


class CountingHook(ContextHook):
    """Runs the transformer, with whatever cache is inside, and sums the shares of the layers that were run.

    Hooks that keep one state for all guidance branches get one for each, put in place before every forward.
    """

    def __init__(self, trace: CountedTrace, costs: dict[str, float], scheduler: Any, state: State) -> None:
        super().__init__()
        self.trace, self.costs, self.scheduler, self.state = trace, costs, scheduler, state
        self.share = 0.0
        self.single_states: dict[tuple[int, str], Any] = {}

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """Inside the `with`, every layer with a cost is charged when its own forward runs.

        Hooks that are put on a layer inside lie on top: where they answer in its place, nothing is charged.
        """

        def charged(forward: Callable[..., Any], cost: float) -> Callable[..., Any]:
            @functools.wraps(forward)  # hooks look at its signature
            def run(*args: Any, **kwargs: Any) -> Any:
                self.share += cost
                return forward(*args, **kwargs)

            return run

        layers = {transformer.get_submodule(name): cost for name, cost in self.costs.items()}
        before = {layer: layer.__dict__.get("forward") for layer in layers}
        for layer, cost in layers.items():
            layer.__dict__["forward"] = charged(layer.forward, cost)
        try:
            yield
        finally:
            for layer, forward in before.items():
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.trace.num_steps = len(self.scheduler.timesteps)
        step, branch = step_index(self.scheduler), self.branch()
        self._states_of(module, branch)
        self.share = 0.0
        self.trace.transformer.start(latent_of(args, kwargs).device)
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.trace.transformer.stop()
        self.trace.note(branch, step, self.share)
        if step == self.trace.num_steps - 1:  # the pipeline clears the states at its end
            kept = [
                self.state(),
                *_states(module),
                *(state for (_, other), state in self.single_states.items() if other != branch),
            ]
            self.trace.cached |= {str(id(tensor)): tensor for tensor in tensors_in(kept)}
        return output

    def _states_of(self, module: nn.Module, branch: str) -> None:
        for hook in _hooks(module):
            state = vars(hook).get("state")
            if state is not None and not isinstance(state, StateManager):
                key = (id(hook), branch)
                if key not in self.single_states:
                    self.single_states[key] = type(state)()
                hook.state = self.single_states[key]

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.single_states = {}
        return super().reset_state(module)


def _hooks(module: nn.Module) -> list[Any]:
    """All diffusers hooks on a module and below it but ours."""
    registries = [m._diffusers_hook for m in module.modules() if hasattr(m, "_diffusers_hook")]
    return [hook for registry in registries for name, hook in registry.hooks.items() if name != COUNTER]


def _states(module: nn.Module) -> list[Any]:
    managers = [value for hook in _hooks(module) for value in vars(hook).values() if isinstance(value, StateManager)]
    return [*(manager._state_cache for manager in managers), *(vars(hook).get("state") for hook in _hooks(module))]


@contextmanager
def diffusers_cache(pipe: Any, config: Any, costs: dict[str, float]) -> Iterator[CountedTrace]:
    """Run `pipe` inside the `with` under a cache of diffusers; afterwards it is as before.

    Args:
        config: for `transformer.enable_cache`.
        costs: of `forward_costs`.

    Yields the trace of the last call. Raises InstallError if another cache is on, if the transformer has no caches
    of diffusers, or if this one matched none of its modules (a silent no-op otherwise).
    """
    transformer = single_denoiser(pipe)

    def put_on(scheduler: Any) -> None:
        before = len(_hooks(transformer))
        transformer.enable_cache(config)
        if len(_hooks(transformer)) == before:
            raise InstallError(
                f"{type(config).__name__} matches no module of {type(transformer).__name__}: it would do nothing. "
                "Give it identifiers that match."
            )

    with counted(pipe, costs, put_on, transformer.disable_cache) as trace:
        yield trace


@contextmanager
def counted(
    pipe: Any,
    costs: dict[str, float],
    put_on: Callable[[Any], Any],
    take_off: Callable[[], Any],
    before_call: Callable[[], Any] = lambda: None,
    state: State = list,
) -> Iterator[CountedTrace]:
    """Run `pipe` inside the `with` under hooks on parts of its transformer, with the layers that run counted.

    Args:
        put_on: called with the scheduler that counts the steps.
        take_off: called at the end, and if `put_on` raises.
        before_call: called before every call of the pipeline.
        state: what is kept between steps beyond the states of diffusers' hooks; its tensors count as cache.
    """
    transformer = single_denoiser(pipe)
    _check_free(pipe, transformer)
    session = CountedSession(pipe, counting(pipe.scheduler), CountedTrace(), transformer, before_call)
    hook = CountingHook(session.trace, costs, session.scheduler, state)
    with _tidied(transformer), hook.watching(transformer):
        try:
            put_on(session.scheduler)
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, COUNTER)
            session.put_on(pipe)
            yield session.trace
        finally:
            session.take_off(pipe)
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(COUNTER, recurse=False)
            take_off()


def _check_free(pipe: Any, transformer: nn.Module) -> None:
    registry = getattr(transformer, "_diffusers_hook", None)
    taken = registry is not None and registry.get_hook(HOOK_NAME) is not None
    check_bare(pipe)
    if taken:
        raise InstallError("erta is installed on this pipeline: call erta.uninstall(pipe) before a cache of diffusers")
    if not hasattr(transformer, "enable_cache"):
        raise InstallError(f"{type(transformer).__name__} has no caches of diffusers (no enable_cache)")
    if transformer.is_cache_enabled:
        raise InstallError("another cache is enabled on this transformer: call transformer.disable_cache() first")


@contextmanager
def _tidied(transformer: nn.Module) -> Iterator[None]:
    """Hooks leave the class's own forward behind as an attribute of every module they were on: at the end none has."""
    try:
        yield
    finally:
        for module in transformer.modules():
            own = module.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(module).forward and getattr(own, "__self__", None) is module:
                del module.__dict__["forward"]


class CountedSession(Session):
    """The session of a cache of another library, with its states cleared before every call."""

    trace: CountedTrace
    refusal = "a cache of another library (diffusers' own, or cache-dit's) is on this pipeline: leave its `with` first"

    def __init__(
        self, pipe: Any, scheduler: Any, trace: CountedTrace, transformer: nn.Module, clear: Callable[[], Any]
    ) -> None:
        super().__init__(pipe, scheduler, trace)
        self.transformer, self.clear = transformer, clear

    def before_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """See `Session`."""
        super().before_call(pipe, arguments)
        HookRegistry.check_if_exists_or_initialize(self.transformer).reset_stateful_hooks()
        self.clear()
