"""Putting a plan on a pipeline and taking it off again: `cached`, `install`, `uninstall`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from erta.errors import SignatureMismatch
from erta.guidance import guidance_scale_of, second_scale_of
from erta.hooks import CacheHook, HookedSession, OnReuse
from erta.pipeline import SESSION, Session, call_arguments, check_bare, find_denoisers
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
    check_bare(pipe)
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
    PlannedSession(pipe, scheduler, trace, hooks).put_on(pipe)
    return trace


def uninstall(pipe: Any) -> None:
    """Take the cache off. Does nothing on a pipeline without one; raises InstallError if another hook lies on top."""
    session: Session | None = pipe.__dict__.get(SESSION)
    if session is not None:
        session.take_off(pipe)


class PlannedSession(HookedSession[CacheHook]):
    """The session of a plan: a call's arguments are checked against it."""

    trace: Trace

    def before_call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `Session`. Raises SignatureMismatch for arguments that the plan was not made for."""
        plan, bound = self.trace.plan, call_arguments(self.pipe_class, pipe, args, kwargs)
        steps, scale = bound.get("num_inference_steps"), guidance_scale_of(bound)
        if steps is not None and steps != plan.num_steps:
            raise SignatureMismatch("num_inference_steps", plan.num_steps, steps)
        if plan.guidance_scale is not None and scale is not None and scale != plan.guidance_scale:
            raise SignatureMismatch("guidance_scale", plan.guidance_scale, scale)
        second = second_scale_of(bound)
        if plan.guidance_scale_2 is not None and second != plan.guidance_scale_2:
            raise SignatureMismatch("guidance_scale_2", plan.guidance_scale_2, second)
        super().before_call(pipe, args, kwargs)

    def show_reuse(self, on_reuse: OnReuse) -> None:
        """Show every prediction at a reused step, of each transformer, to `on_reuse` (see `CacheHook`)."""
        for hook in self.hooks.values():
            hook.on_reuse = on_reuse
