"""Caches of single modules on a static schedule: one hook and one counter for FORA, SmoothCache, T-GATE and Delta-DiT.

A module's output is kept where it is computed and returned where it is not, in each guidance branch. What is left out
is counted in forward equivalents, from the layers that really ran (`counting`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from erta.architectures import ARCHITECTURES, Architecture, architecture_of, knowing, latent_of, model_name
from erta.errors import ErtaError
from erta.pipeline import single_denoiser
from erta.policy import Mask
from erta.scheduler import step_index
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.counting import CountedTrace, counted
from experiments.methods.common.knob import Attach, Knob, knob_arm

MODULE_HOOK = "erta_module"
Schedule = dict[str, Mask]  # by component; one that is not named is always computed


class _KeptState(BaseState):
    def __init__(self) -> None:
        self.value: Any = None

    def reset(self) -> None:
        self.value = None


class ModuleHook(ModelHook):
    """Runs a module where its mask says so, and returns its last output elsewhere."""

    _is_stateful = True

    def __init__(self, mask: Mask, current_step: Callable[[], int]) -> None:
        super().__init__()
        self.mask, self.current_step = mask, current_step
        self.states = StateManager(_KeptState)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.states.get_state()
        if self.mask[self.current_step()] or state.value is None:
            state.value = self.fn_ref.original_forward(*args, **kwargs)
        return state.value

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


class UnreadHook(ModelHook):
    """Runs a module where its mask says so, and gives zeros of its output's form where nothing reads them."""

    def __init__(self, mask: Mask, current_step: Callable[[], int]) -> None:
        super().__init__()
        self.mask, self.current_step = mask, current_step
        self.width: int | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.mask[self.current_step()] or self.width is None:
            output = self.fn_ref.original_forward(*args, **kwargs)
            self.width = output.shape[-1]
            return output
        x = latent_of(args, kwargs)
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


def components_of(transformer: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each component type. Raises ErtaError for a transformer that is not known."""
    return _matching(transformer, known_components(transformer).components)


def known_components(transformer: nn.Module) -> Architecture:
    """What is known of a transformer. Raises ErtaError if its modules are not."""
    known = architecture_of(transformer)
    if not known.components:
        raise ErtaError(
            f"the modules of {known.name} are not known (those of {knowing('components')} are): add an entry to "
            "erta/architectures.py"
        )
    return known


def _matching(transformer: nn.Module, patterns: Mapping[str, str]) -> dict[str, list[nn.Module]]:
    return {
        kind: [module for name, module in transformer.named_modules() if re.fullmatch(pattern, name)]
        for kind, pattern in patterns.items()
    }


@contextmanager
def hooked(
    pipe: Any, costs: dict[str, float], hooks_of: Callable[[Any], list[tuple[nn.Module, ModelHook]]]
) -> Iterator[CountedTrace]:
    """Run `pipe` inside the `with` under hooks on modules; `hooks_of` makes them from the scheduler."""
    placed: list[nn.Module] = []

    def put_on(scheduler: Any) -> None:
        for module, hook in hooks_of(scheduler):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, MODULE_HOOK)
            placed.append(module)
        _renew(pipe)

    def take_off() -> None:
        for module in placed:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(MODULE_HOOK, recurse=False)
        _renew(pipe)

    with counted(pipe, costs, put_on, take_off) as trace:
        yield trace


def _renew(pipe: Any) -> None:
    """diffusers keeps a list of the modules that are told the guidance branch: have it made anew."""
    HookRegistry.check_if_exists_or_initialize(single_denoiser(pipe)).invalidate_child_registries_cache()


def module_cache(pipe: Any, schedule: Schedule, costs: dict[str, float]) -> Any:
    """Run `pipe` inside the `with` with each component type computed where the schedule says so."""
    transformer = single_denoiser(pipe)
    modules, unread = components_of(transformer), _matching(transformer, architecture_of(transformer).unread)
    unknown = sorted(set(schedule) - set(modules))
    if unknown:
        having = [entry.name for entry in ARCHITECTURES.values() if set(unknown) <= set(entry.components)]
        raise ErtaError(
            f"{model_name(transformer)} has no modules of type {', '.join(unknown)}, only {', '.join(modules)}: this method "
            f"is for {', '.join(having)}"
        )

    def hooks_of(scheduler: Any) -> list[tuple[nn.Module, ModelHook]]:
        return [
            (module, hook(mask, lambda: step_index(scheduler)))
            for hook, of_kind in ((ModuleHook, modules), (UnreadHook, unread))
            for kind, mask in schedule.items()
            for module in of_kind.get(kind, [])
        ]

    return hooked(pipe, costs, hooks_of)


def module_arm(setup: Setup, knob: Knob, schedule_at: Callable[[Any], Schedule]) -> Arm:
    """An arm whose schedule of component types follows from a knob."""
    costs = setup.costs

    def attach_with(value: Any) -> Attach:
        schedule = schedule_at(value)
        return lambda pipe: module_cache(pipe, schedule, costs)

    return knob_arm(setup, knob, attach_with)


def every(interval: int, num_steps: int) -> Mask:
    """Steps 0, interval, 2 interval …"""
    return tuple(step % interval == 0 for step in range(num_steps))


def tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """A module's output as a tuple: some give one tensor, some two (image and text)."""
    return output if isinstance(output, tuple) else (output,)
