"""Putting a plan on a pipeline and taking it off again: `cached`, `install`, `uninstall`."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

from torch import nn

from erta.attachment import clear
from erta.errors import InstallError
from erta.guidance import samples_of
from erta.hooks import CacheHook, HookedSession, OnReuse
from erta.pipeline import check_bare, find_denoisers, leaving, session_of
from erta.plan import Plan
from erta.scheduler import check_start, planned_scheduler
from erta.signature import check_arguments, check_signature, model_signature, passing_signature
from erta.site import make_site
from erta.trace import Trace


class cached(AbstractContextManager[Trace]):
    """Run `pipe` under `plan` inside the `with`; afterwards, or after an exception, it is as before.

    Only calls of this pipeline object are cached. Others that share its transformer, made before or inside the `with` or in
    another thread, and forwards by hand run as they always do. What you change inside (another scheduler, hooks of other
    libraries, devices) stays; what the plan does not fit any more is refused at the next call.

    Gives a Trace of the last call. Every call checks at its end that what was executed is what was planned; one that was
    interrupted (`pipe._interrupt`) returns what it has, and the trace says so.

    Raises:
        SignatureMismatch: the plan was made for another model, scheduler, size, guidance or number of steps.
        ExecutionMismatch: a call did not execute the plan.
        InstallError: a cache is on this pipeline already, or its transformer is not one that a cache can be put on.
    """

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan = pipe, plan
        self._inside: ExitStack | None = None

    def __enter__(self) -> Trace:
        trace = install(self.pipe, self.plan)
        self._inside = ExitStack()
        self._inside.enter_context(leaving(lambda: uninstall(self.pipe)))
        return trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        inside, self._inside = self._inside, None
        return None if inside is None else inside.__exit__(kind, error, traceback)


def install(pipe: Any, plan: Plan) -> Trace:
    """Put `plan` on this pipeline object until `uninstall`. See `cached`."""
    check_bare(pipe)
    transformers = find_denoisers(pipe)
    if plan.signature is not None:
        check_signature(plan.signature, model_signature(pipe))
        made_in, now = plan.signature.get("dtype"), str(next(iter(transformers.values())).dtype)
        if made_in is not None and made_in != now:
            warnings.warn(f"the calibration was made in {made_in}, the model runs in {now}", stacklevel=3)
    trace = Trace(plan)
    hooks: dict[int, CacheHook] = {}

    def scheduler() -> Any:
        return session.scheduler

    for stage, transformer in transformers.items():
        site = make_site(plan.site, transformer, plan.reuse)
        hooks[stage] = CacheHook(plan, trace, site, scheduler, stage, hooks.get(stage - 1))
    session = PlannedSession(pipe, planned_scheduler(pipe.scheduler, plan), trace, hooks)
    session.put_on(pipe)
    return trace


def uninstall(pipe: Any) -> None:
    """Take the cache off, from under hooks of others too. Does nothing where there is none.

    Args:
        pipe: a pipeline; or a transformer, from which whatever holds a cache of ours on it takes it off.

    Raises InstallError while a call of that pipeline runs.
    """
    if isinstance(pipe, nn.Module):
        clear(pipe)
        return
    session = session_of(pipe)
    if session is not None:
        session.take_off(pipe)


class PlannedSession(HookedSession[CacheHook]):
    """The session of a plan: a call's arguments are checked against it."""

    trace: Trace

    def before_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """See `HookedSession`. Raises SignatureMismatch for arguments that the plan was not made for."""
        plan = self.trace.plan
        check_arguments(plan, arguments)
        super().before_call(pipe, arguments)
        if plan.signature is not None:
            check_signature(plan.signature, passing_signature(pipe, arguments))
        samples = None if plan.branches is None else samples_of(arguments)
        for hook in self.hooks.values():
            hook.samples = samples

    def first_forward(self) -> None:
        """See `HookedSession`. Raises SignatureMismatch if the run begins at another step of its grid than the plan."""
        super().first_forward()
        check_start(self.scheduler, self.trace.plan)

    def scheduler_of_call(self, own: Any) -> Any:
        """The plan's grid under whatever scheduler the pipeline has now."""
        return planned_scheduler(own, self.trace.plan)

    def show_reuse(self, on_reuse: OnReuse) -> None:
        """Show every prediction at a reused step, of each transformer, to `on_reuse` (see `CacheHook`)."""
        for hook in self.hooks.values():
            hook.on_reuse = on_reuse


def planned_session(pipe: Any) -> PlannedSession:
    """The session of the plan that is on this pipeline. Raises InstallError if there is none."""
    session = session_of(pipe)
    if not isinstance(session, PlannedSession):
        raise InstallError("no plan is installed on this pipeline")
    return session
