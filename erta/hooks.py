"""The one place that touches a pipeline's forward: hooks on the root transformer, or on each of two (Wan2.2).

Both hooks replace the transformer's forward through diffusers' own hook registry and come off without a
trace. The step comes from the scheduler, the guidance branch from the pipeline's `cache_context`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from erta.architectures import architecture_of, latent_of
from erta.coefficients import Coefficients
from erta.errors import ExecutionMismatch, InstallError, SignatureMismatch
from erta.guidance import SINGLE_BRANCH, branches_of
from erta.pipeline import SESSION, Session, find_denoisers
from erta.plan import Plan
from erta.site import SeenForward, Site
from erta.trace import CallTrace, Stopwatch, Trace

HOOK_NAME = "erta_cache"
OBSERVER_NAME = "erta_observer"
AnyHook = TypeVar("AnyHook", bound="_BranchHook")
OnReuse = Callable[[int, str, torch.Tensor, Callable[[], torch.Tensor]], None]


class _BranchState(BaseState):
    """What one guidance branch keeps: the last computed residual (or velocity)."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def reset(self) -> None:
        self.value = None


class _BranchHook(ModelHook):
    """Knows the current guidance branch, and the forward under which it was attached."""

    _is_stateful = True
    attached_as: Any = None

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


class CachingHook(_BranchHook):
    """What hooks that leave forwards out have in common: a trace, a site, the clock around the transformer."""

    def __init__(self, trace: CallTrace, site: Site, current_step: Callable[[], int]) -> None:
        super().__init__()
        self.trace, self.site, self.current_step = trace, site, current_step
        self.inside_s = 0.0  # of the last forward, as the CPU sees it

    def _timed(self, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """The transformer's forward alone on the trace's clock; what the site does around it is the hook's time."""

        def run(*args: Any, **kwargs: Any) -> Any:
            called = time.perf_counter()
            self.trace.transformer.start(device)
            output = forward(*args, **kwargs)
            self.trace.transformer.stop()
            self.inside_s = time.perf_counter() - called
            return output

        return run

    @staticmethod
    def _answer(velocity: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """A predicted velocity in the form that the pipeline asked for."""
        return Transformer2DModelOutput(sample=velocity) if kwargs.get("return_dict", True) else (velocity,)


class CacheHook(CachingHook):
    """Runs the transformer at computed steps; at reused ones predicts from the last residual, rectified if planned.

    A residual is kept only where the next step reuses it.

    `on_reuse(step, context, v_cached, true_velocity)`, if set, sees every prediction before rectification, and
    can run the transformer for what it stands in for: for diagnosis, since that costs what the cache saves.

    `stage` is 1 on a pipeline's second transformer, else 0. Each transformer has a hook and a state of its own;
    `replaces` is the hook of the one that ran before, whose residuals are freed as soon as this one computes.
    """

    def __init__(
        self,
        plan: Plan,
        trace: Trace,
        site: Site,
        current_step: Callable[[], int],
        stage: int = 0,
        replaces: CacheHook | None = None,
    ) -> None:
        super().__init__(trace, site, current_step)
        self.plan, self.stage, self.replaces = plan, stage, replaces
        self.coefficients: Coefficients | None = None
        self.on_reuse: OnReuse | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entered = time.perf_counter()
        x, forward = latent_of(args, kwargs), self.fn_ref.original_forward
        step, branch = self.current_step(), self.branch()
        self._check(x, step, branch)
        self.trace.stages[step] = self.stage
        state = self.states.get_state()
        if self.plan.mask[step]:
            if self.replaces is not None:
                self.replaces.states.reset()
            output, residual = self.site.compute(self._timed(forward, x.device), args, kwargs)
            state.value = residual if self.plan.is_reused(step + 1) else None
            self.trace.computed(branch, step, state.value, time.perf_counter() - entered - self.inside_s)
            return output
        if state.value is None:
            raise ExecutionMismatch(
                f"step {step} of branch {branch!r} is to be reused, but nothing was computed before"
            )
        velocity = self.site.predict(forward, args, kwargs, state.value)
        if self.on_reuse is not None:
            self.on_reuse(step, branch, velocity, lambda: self.site.compute(forward, args, kwargs)[0][0])
        if self.coefficients is None:
            self.coefficients = Coefficients(self.plan, architecture_of(module))
        velocity = self.coefficients.rectify(velocity, step, branch)
        self.trace.reused(branch, step, time.perf_counter() - entered)
        return self._answer(velocity, kwargs)

    def _check(self, x: torch.Tensor, step: int, branch: str) -> None:
        plan = self.plan
        if step >= plan.num_steps:
            raise ExecutionMismatch(f"the scheduler is at step {step}, but the plan has {plan.num_steps} steps")
        if plan.takeover is not None and self.stage != int(step >= plan.takeover):
            runs = "first" if self.stage == 0 else "second"
            raise SignatureMismatch("takeover", f"step {plan.takeover}", f"another: step {step} is the {runs}'s")
        if plan.latent_shape is not None and tuple(x.shape[1:]) != plan.latent_shape:
            raise SignatureMismatch("latent_shape", plan.latent_shape, tuple(x.shape[1:]))
        if plan.branches is not None and not set(branches_of(branch, plan.guidance_scale)) <= set(plan.branches):
            raise SignatureMismatch("branches", plan.branches, branch)


Observer = Callable[[SeenForward], None]  # called once a forward, in order of the steps


class ObserverHook(_BranchHook):
    """Runs the transformer as it is, and shows an observer every output and what a cache would have made of it."""

    def __init__(self, observer: Observer, site: Site, current_step: Callable[[], int], stage: int = 0) -> None:
        super().__init__()
        self.observer, self.site, self.current_step, self.stage = observer, site, current_step, stage
        self.transformer = Stopwatch()

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        step, branch = self.current_step(), self.branch()
        x = latent_of(args, kwargs).detach()
        self.transformer.start(x.device)
        output, kept = self.site.compute(forward, args, kwargs)
        self.transformer.stop()

        def predict(earlier: torch.Tensor) -> torch.Tensor:
            return self.site.predict(forward, args, kwargs, earlier).detach()

        self.observer(SeenForward(step, branch, x, output[0].detach(), kept.detach(), predict, self.stage))
        return output


class HookedSession(Session, Generic[AnyHook]):
    """A session with a hook on each transformer, by stage."""

    def __init__(self, pipe: Any, scheduler: Any, trace: CallTrace, hooks: Mapping[int, AnyHook]) -> None:
        super().__init__(pipe, scheduler, trace)
        self.transformers, self.hooks = find_denoisers(pipe), hooks

    def put_on(self, pipe: Any) -> None:
        """Hooks first: if one is refused, the pipeline is as it was."""
        attach_all(self.transformers, self.hooks, HOOK_NAME)
        super().put_on(pipe)

    def take_off(self, pipe: Any) -> None:
        """See `Session`. Raises InstallError if another hook lies on top of ours."""
        if pipe.__dict__.get(SESSION) is self:
            detach_all(self.transformers, HOOK_NAME)
        super().take_off(pipe)

    def before_call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After an exception the last call's state survives, and offload renews its own hooks after every call."""
        for stage, transformer in self.transformers.items():
            attach_again_if_dropped(transformer, self.hooks[stage])
            self.hooks[stage].reset_state(transformer)


@contextmanager
def observed(
    transformers: dict[int, nn.Module],
    observer: Observer,
    site_of: Callable[[nn.Module], Site],
    current_step: Callable[[], int],
) -> Iterator[list[ObserverHook]]:
    """An `ObserverHook` on each transformer, by stage, inside the `with`; raises what `attach` raises."""
    hooks = {
        stage: ObserverHook(observer, site_of(transformer), current_step, stage)
        for stage, transformer in transformers.items()
    }
    attach_all(transformers, hooks, OBSERVER_NAME)
    try:
        yield list(hooks.values())
    finally:
        detach_all(transformers, OBSERVER_NAME)


def attach_all(transformers: dict[int, nn.Module], hooks: Mapping[int, _BranchHook], name: str) -> None:
    """`attach` for each transformer and hook of a stage: all of them, or none if one is refused."""
    done: list[nn.Module] = []
    try:
        for stage, transformer in transformers.items():
            attach(transformer, hooks[stage], name)
            done.append(transformer)
    except InstallError:
        for transformer in done:
            detach(transformer, name)
        raise


def detach_all(transformers: dict[int, nn.Module], name: str) -> None:
    """Take a hook off each transformer: off all of them, or off none if another hook lies on top of one."""
    for transformer in transformers.values():
        check_detachable(transformer, name)
    for transformer in transformers.values():
        detach(transformer, name)


def attach(transformer: nn.Module, hook: _BranchHook, name: str) -> None:
    """Register a hook; raises InstallError if a cache is on this transformer already, or it was compiled whole."""
    if getattr(transformer, "is_cache_enabled", False):
        raise InstallError(
            "diffusers' own cache is enabled on this transformer: call transformer.disable_cache() before installing erta"
        )
    if getattr(transformer, "_compiled_call_impl", None) is not None or hasattr(transformer, "_orig_mod"):
        raise InstallError(
            "this transformer was compiled whole: a cache inside it would compile anew at every step. Use transformer.compile_repeated_blocks(fullgraph=True), which a cache leaves alone"
        )
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    for taken in (HOOK_NAME, OBSERVER_NAME):
        if registry.get_hook(taken) is not None:
            raise InstallError("erta is installed on this transformer already: call erta.uninstall(pipe) first")
    registry.register_hook(hook, name)
    hook.attached_as = transformer.__dict__["forward"]


def attach_again_if_dropped(transformer: nn.Module, hook: _BranchHook) -> None:
    """Put our forward back on top of accelerate's, which model offload renews after every pipeline call."""
    current = transformer.__dict__.get("forward")
    renewed = hasattr(transformer, "_hf_hook") and transformer._old_forward is not hook.attached_as
    if renewed and current is not hook.attached_as:
        hook.fn_ref.original_forward = current
        transformer.forward = hook.attached_as


def check_detachable(transformer: nn.Module, name: str) -> None:
    """Raise InstallError if another hook was put on top of ours: taking ours off would break it."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    order = registry._hook_order
    if name in order and order[-1] != name:
        raise InstallError(f"the hook {order[-1]!r} was put on top of erta's: remove that one first")
    if name in order and getattr(transformer, "_old_forward", None) is registry.hooks[name].attached_as:
        raise InstallError(
            "model offload was enabled after erta was installed: call pipe.remove_all_hooks(), then erta.uninstall(pipe)"
        )


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
