"""Putting a plan on a pipeline and taking it off again: `cached`, `install`, `uninstall`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from erta.errors import InstallError, SignatureMismatch
from erta.guidance import guidance_scale_of, second_scale_of
from erta.hooks import HOOK_NAME, CacheHook, OnReuse, attach_again_if_dropped, attach_all, check_detachable, detach
from erta.pipeline import SESSION, call_arguments, checked_class, find_denoisers
from erta.plan import Plan
from erta.scheduler import planned_scheduler, step_index
from erta.signature import check_signature, model_signature
from erta.site import make_site
from erta.trace import Trace


@contextmanager
def cached(pipe: Any, plan: Plan) -> Iterator[Trace]:
    """Run `pipe` under `plan` inside the `with`; afterwards, or after an exception, it is as before.

    Yields a Trace of the last call. Every call checks at its end that what was executed is what was planned.

    Raises:
        SignatureMismatch: the plan was made for another model, scheduler, size, guidance or number of steps.
        ExecutionMismatch: a call did not execute the plan.
        InstallError: a cache is installed already.
    """
    trace = install(pipe, plan)
    try:
        yield trace
    finally:
        uninstall(pipe)


def install(pipe: Any, plan: Plan) -> Trace:
    """Put `plan` on this pipeline object until `uninstall`. See `cached`."""
    if SESSION in pipe.__dict__:
        raise InstallError("erta is installed on this pipeline already: call erta.uninstall(pipe) first")
    transformers = find_denoisers(pipe)
    if plan.signature is not None:
        check_signature(plan.signature, model_signature(pipe))
        made_in, now = plan.signature.get("dtype"), str(next(iter(transformers.values())).dtype)
        if made_in is not None and made_in != now:
            warnings.warn(f"the calibration was made in {made_in}, the model runs in {now}", stacklevel=3)
    scheduler = planned_scheduler(pipe.scheduler, plan)
    trace = Trace(plan)
    hooks: dict[int, CacheHook] = {}
    for stage, transformer in transformers.items():
        site = make_site(plan.site, transformer, plan.reuse)
        hooks[stage] = CacheHook(plan, trace, site, lambda: step_index(scheduler), stage, hooks.get(stage - 1))
    attach_all(transformers, hooks, HOOK_NAME)
    session = _Session(pipe, plan, trace, hooks)
    pipe.scheduler = scheduler
    pipe.__class__ = checked_class(session)
    pipe.__dict__[SESSION] = session
    return trace


def uninstall(pipe: Any) -> None:
    """Take the plan off. Does nothing on a pipeline without one; raises InstallError if another hook lies on top."""
    session: _Session | None = pipe.__dict__.get(SESSION)
    if session is None:
        return
    for transformer in session.transformers.values():
        check_detachable(transformer, HOOK_NAME)
    for transformer in session.transformers.values():
        detach(transformer, HOOK_NAME)
    pipe.__class__ = session.pipe_class
    pipe.scheduler = session.scheduler
    del pipe.__dict__[SESSION]


class _Session:
    """What must be put back, and what happens around every call."""

    def __init__(self, pipe: Any, plan: Plan, trace: Trace, hooks: dict[int, CacheHook]) -> None:
        self.pipe_class, self.scheduler = type(pipe), pipe.scheduler
        self.transformers = find_denoisers(pipe)
        self.plan, self.trace, self.hooks = plan, trace, hooks

    def call(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, with the state cleared before and what was executed checked after."""
        self._check_arguments(pipe, args, kwargs)
        for stage, transformer in self.transformers.items():
            attach_again_if_dropped(transformer, self.hooks[stage])
            self.hooks[stage].reset_state(transformer)  # after an exception the last call's state survives
        self.trace.begin()
        result = self.pipe_class.__call__(pipe, *args, **kwargs)
        self.trace.finish()
        return result

    def show_reuse(self, on_reuse: OnReuse) -> None:
        """Show every prediction at a reused step, of each transformer, to `on_reuse` (see `CacheHook`)."""
        for hook in self.hooks.values():
            hook.on_reuse = on_reuse

    def _check_arguments(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = call_arguments(self.pipe_class, pipe, args, kwargs)
        steps, scale = bound.get("num_inference_steps"), guidance_scale_of(bound)
        if steps is not None and steps != self.plan.num_steps:
            raise SignatureMismatch("num_inference_steps", self.plan.num_steps, steps)
        if self.plan.guidance_scale is not None and scale is not None and scale != self.plan.guidance_scale:
            raise SignatureMismatch("guidance_scale", self.plan.guidance_scale, scale)
        second = second_scale_of(bound)
        if self.plan.guidance_scale_2 is not None and second != self.plan.guidance_scale_2:
            raise SignatureMismatch("guidance_scale_2", self.plan.guidance_scale_2, second)
