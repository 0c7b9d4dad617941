"""The one place that touches a model: hooks on the root transformer, at the `output` site.

Both hooks replace the transformer's forward through diffusers' own hook registry and come off without a
trace. The step comes from the scheduler, the guidance branch from the pipeline's `cache_context`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from erta.errors import ExecutionMismatch, InstallError, SignatureMismatch
from erta.plan import Plan, Rectification
from erta.trace import Trace

HOOK_NAME = "erta_output_cache"
OBSERVER_NAME = "erta_observer"
SINGLE_BRANCH = "single"  # of pipelines that set no cache context


class _BranchState(BaseState):
    """What one guidance branch keeps: the last computed residual (or velocity)."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def reset(self) -> None:
        self.value = None


class _BranchHook(ModelHook):
    """Knows the current guidance branch."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.states = StateManager(_BranchState)

    def branch(self) -> str:
        if self.states._context is None:
            self.states.set_context(CacheContext(name=SINGLE_BRANCH))
        return self.states.context.name

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


class OutputCacheHook(_BranchHook):
    """Runs the transformer at computed steps; at reused steps returns `x + r`, rectified if the plan says so."""

    def __init__(self, plan: Plan, trace: Trace, current_step: Callable[[], int]) -> None:
        super().__init__()
        self.plan, self.trace, self.current_step = plan, trace, current_step
        self.coefficients = _Coefficients(plan)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entered = time.perf_counter()
        x = _latent(args, kwargs)
        step, branch = self.current_step(), self.branch()
        self._check(x, step, branch)
        state = self.states.get_state()
        if self.plan.mask[step]:
            called = time.perf_counter()
            self.trace.transformer.start(x.device)
            output = self.fn_ref.original_forward(*args, **kwargs)
            self.trace.transformer.stop()
            returned = time.perf_counter()
            velocity = output[0]
            state.value = velocity if self.plan.reuse == "velocity" else velocity - like_output(x, velocity)
            overhead_s = time.perf_counter() - returned + called - entered
            self.trace.computed(branch, step, state.value, overhead_s)
            return output
        if state.value is None:
            raise ExecutionMismatch(
                f"step {step} of branch {branch!r} is to be reused, but nothing was computed before"
            )
        velocity = state.value
        if self.plan.reuse == "residual":
            velocity = like_output(x, velocity) + velocity
        velocity = self.coefficients.rectify(velocity, step, branch)
        self.trace.reused(branch, step, time.perf_counter() - entered)
        return Transformer2DModelOutput(sample=velocity) if kwargs.get("return_dict", True) else (velocity,)

    def _check(self, x: torch.Tensor, step: int, branch: str) -> None:
        plan = self.plan
        if step >= plan.num_steps:
            raise ExecutionMismatch(f"the scheduler is at step {step}, but the plan has {plan.num_steps} steps")
        if plan.latent_shape is not None and tuple(x.shape[1:]) != plan.latent_shape:
            raise SignatureMismatch("latent_shape", plan.latent_shape, tuple(x.shape[1:]))
        if plan.branches is not None and branch not in plan.branches:
            raise SignatureMismatch("branches", plan.branches, branch)


class ObserverHook(_BranchHook):
    """Runs the transformer as it is and hands `(step, branch, x, velocity)` to `observe`."""

    def __init__(
        self, observe: Callable[[int, str, torch.Tensor, torch.Tensor], None], current_step: Callable[[], int]
    ) -> None:
        super().__init__()
        self.observe, self.current_step = observe, current_step

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.fn_ref.original_forward(*args, **kwargs)
        velocity = output[0]
        self.observe(self.current_step(), self.branch(), _latent(args, kwargs).detach(), velocity.detach())
        return output


class _Coefficients:
    """The plan's rectification as tensors on the latent's device, laid out once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device: torch.device | None = None
        self.tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def rectify(self, velocity: torch.Tensor, step: int, branch: str) -> torch.Tensor:
        """`gain * velocity + offset` with the coefficients of this step and branch, channel by channel."""
        rect = self.plan.rectification
        if rect is None:
            return velocity
        if velocity.device != self.device:
            self.device, self.tensors = velocity.device, self._lay_out(rect, velocity)
        gain, offset = self.tensors[branch]
        # in float32: a gain of 0.98 has no room in bfloat16
        return torch.addcmul(offset[step], gain[step], velocity.float()).to(velocity.dtype)

    def _lay_out(self, rect: Rectification, velocity: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        shape = [1] * velocity.ndim
        shape[channel_axis(velocity)] = -1

        def place(array: Any) -> torch.Tensor:
            return torch.as_tensor(array).to(velocity.device, torch.float32).reshape(len(array), *shape)

        return {
            branch: (place(rect.gain[:, index]), place(rect.offset[:, index]))
            for index, branch in enumerate(self.plan.branches or ())
        }


def channel_axis(latent: torch.Tensor) -> int:
    """The channel axis of a latent: the last one for packed tokens (b, n, c) as in FLUX, else 1 (b, c, …)."""
    return latent.ndim - 1 if latent.ndim == 3 else 1


def like_output(x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """The part of the input that the output answers to: its first channels (image-to-video appends others)."""
    axis = channel_axis(velocity)
    return x if x.shape[axis] == velocity.shape[axis] else x.narrow(axis, 0, velocity.shape[axis])


def attach(transformer: nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook; raises InstallError if a cache is on this transformer already."""
    if getattr(transformer, "is_cache_enabled", False):
        raise InstallError(
            "diffusers' own cache is enabled on this transformer: call transformer.disable_cache() before installing erta"
        )
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    for taken in (HOOK_NAME, OBSERVER_NAME):
        if registry.get_hook(taken) is not None:
            raise InstallError("erta is installed on this transformer already: call erta.uninstall(pipe) first")
    registry.register_hook(hook, name)


def check_detachable(transformer: nn.Module, name: str) -> None:
    """Raise InstallError if another hook was put on top of ours: taking ours off would break it."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    order = registry._hook_order
    if name in order and order[-1] != name:
        raise InstallError(f"the hook {order[-1]!r} was put on top of erta's: remove that one first")


def detach(transformer: nn.Module, name: str) -> None:
    """Take a hook off and leave the module as it was; does nothing if the hook is gone."""
    check_detachable(transformer, name)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(name) is None:
        return
    registry.remove_hook(name, recurse=False)
    own = transformer.__dict__.get("forward")
    if getattr(own, "__func__", None) is type(transformer).forward:
        del transformer.__dict__["forward"]  # the class's own forward again, as before the first hook


def _latent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
