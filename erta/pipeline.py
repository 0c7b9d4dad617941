"""A diffusers pipeline as the library sees it: its transformers, its call, and the session that is put on it."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import nn

from erta.errors import InstallError
from erta.scheduler import ShowGrid, ShowResult, ShowStep, watched
from erta.trace import CallTrace

SESSION = "_erta_session"
# Whose call this thread is in; and whose forwards these are, which is nobody's inside a callback of the user's.
_RUNNING: ContextVar[Session | None] = ContextVar("erta_running", default=None)
ANSWERING: ContextVar[Session | None] = ContextVar("erta_answering", default=None)


def latent_call(prompt: str | None, seed: int, pipeline_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call that ends in latents, from the noise of a CPU generator; no prompt where it is None."""
    generator = torch.Generator("cpu").manual_seed(seed)
    text = {} if prompt is None else {"prompt": prompt}
    return {"output_type": "latent", "generator": generator, **pipeline_kwargs, **text}


def call_arguments(pipe_class: type, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline call by name, with the pipeline's defaults filled in and its `**kwargs` among them.

    The guidance scale of a pipeline that has a guider is the guider's.
    """
    bound = inspect.signature(pipe_class.__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name)
    if arguments.get("guidance_scale") is None and getattr(pipe, "guider", None) is not None:
        arguments["guidance_scale"] = getattr(pipe.guider, "guidance_scale", None)
    return arguments


class Session:
    """What happens around every call of one pipeline object. The one way on and off a pipeline.

    The object gets a subclass of its own class, with the same name, whose call goes through `call`. In such a call, and
    in its thread alone, the pipeline's scheduler is the one that the cache runs with; everywhere else, also while the call
    runs, it is the pipeline's own. Other objects of that class stay as they are, also those made from this one.
    """

    refusal = "erta is installed on this pipeline already: call erta.uninstall(pipe) first"

    def __init__(self, pipe: Any, scheduler: Any, trace: CallTrace) -> None:
        self.pipe_class, self.own_scheduler = _own_class(pipe), pipe.scheduler
        self.scheduler, self.trace = scheduler, trace
        self.show_step: ShowStep | None = None  # see `watched`
        self.show_grid: ShowGrid | None = None
        self.show_result: ShowResult | None = None
        self.owner = weakref.ref(pipe)
        self._one_call = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self  # a copy of the pipeline is not its owner

    def put_on(self, pipe: Any) -> None:
        """From now on calls of `pipe` are this session's."""
        pipe.__class__ = _with_sessions(self.pipe_class)
        pipe.__dict__[SESSION] = self

    def take_off(self, pipe: Any) -> None:
        """Give the class back; does nothing if another session, or none, is on. Raises InstallError during a call."""
        if session_of(pipe) is not self:
            return
        if self._one_call.locked():
            raise InstallError("a call of this pipeline is still running: call erta.uninstall(pipe) after it")
        self.let_go()
        if type(pipe) is _with_sessions(self.pipe_class):
            pipe.__class__ = self.pipe_class
        del pipe.__dict__[SESSION]

    def let_go(self) -> None:
        """To be overridden: take off what the session put elsewhere than on the pipeline object."""

    def call(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, with the state cleared before and what was executed checked after.

        Raises InstallError if this pipeline object is in a call already: its scheduler serves one at a time.
        """
        if not self._one_call.acquire(blocking=False):
            raise InstallError(
                "this pipeline is in a call already, and its scheduler serves one call at a time: make a pipeline for each "
                "thread, as in type(pipe)(**pipe.components), and install erta on each"
            )
        try:
            self.before_call(pipe, call_arguments(self.pipe_class, pipe, args, kwargs))
            self.trace.begin()
            with watched(self.scheduler, self.show_step, self.show_grid, self.show_result):
                result = self._own_call(pipe, args, kwargs)
            self.trace.finish(interrupted=bool(getattr(pipe, "_interrupt", False)))
            return result
        finally:
            self.after_call()
            self._one_call.release()

    def _own_call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(self.pipe_class.__call__).bind(pipe, *args, **kwargs)
        for name, value in bound.arguments.items():
            if name.startswith("callback") and callable(value):
                bound.arguments[name] = _outside(value)
        running, answering = _RUNNING.set(self), ANSWERING.set(self)
        try:
            return self.pipe_class.__call__(*bound.args, **bound.kwargs)
        finally:
            _RUNNING.reset(running)
            ANSWERING.reset(answering)

    def before_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """To be extended: check the arguments, by name. Raises InstallError if the pipeline got another scheduler."""
        if pipe.scheduler is not self.own_scheduler:
            raise InstallError(
                "this pipeline got another scheduler inside the `with`: leave it first, then enter it anew"
            )

    def after_call(self) -> None:
        """To be overridden: let go of what a call kept, whether it ended or was aborted."""


def _own_class(pipe: Any) -> type:
    """A pipeline's class without what a session makes of it (a copy of a pipeline keeps that class)."""
    return getattr(type(pipe), "_erta_base", type(pipe))


@functools.cache
def _with_sessions(base: Any) -> type:
    """A subclass of a pipeline class, named like it, whose objects are the base's but for the one with a session."""

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__class__ = base  # made by type(pipe)(**pipe.components): another object, no session of ours
        base.__init__(self, *args, **kwargs)

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = session_of(self)
        return base.__call__(self, *args, **kwargs) if session is None else session.call(self, *args, **kwargs)

    def scheduler(self: Any) -> Any:
        session = _RUNNING.get()
        return self.__dict__["scheduler"] if session is None or session.owner() is not self else session.scheduler

    def set_scheduler(self: Any, scheduler: Any) -> None:
        self.__dict__["scheduler"] = scheduler

    def components(self: Any) -> dict[str, Any]:
        return {**base.components.fget(self), "scheduler": self.__dict__["scheduler"]}

    members = {"__init__": __init__, "__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    properties = {"scheduler": property(scheduler, set_scheduler), "components": property(components)}
    return type(base)(base.__name__, (base,), {**members, **properties, "_erta_base": base})


def session_of(pipe: Any) -> Session | None:
    """The session on this pipeline object; None without one, and on a copy of an object that has one."""
    session = getattr(pipe, "__dict__", {}).get(SESSION)
    return session if session is not None and session.owner() is pipe else None


@contextmanager
def leaving(take_off: Callable[[], None]) -> Iterator[None]:
    """Take something off at the end of a `with`; what is wrong with that never stands in for the user's exception."""
    try:
        yield
    except BaseException as error:
        try:
            take_off()
        except InstallError as reason:
            error.add_note(f"erta could not be taken off: {reason}")
        raise
    take_off()


def _outside(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A user's callback, inside which forwards and calls are the user's own."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return _Outside([callback])

    @functools.wraps(callback)
    def run(*args: Any, **kwargs: Any) -> Any:
        answering = ANSWERING.set(None)
        try:
            return callback(*args, **kwargs)
        finally:
            ANSWERING.reset(answering)

    return run


class _Outside(MultiPipelineCallbacks):
    """diffusers' own kind of callback, which pipelines know by its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _outside(super().__call__)(*args, **kwargs)


def check_bare(pipe: Any) -> None:
    """Raise InstallError, with what to do, if a session is on this pipeline object."""
    session = session_of(pipe)
    if session is not None:
        raise InstallError(session.refusal)


def find_denoisers(pipe: Any) -> dict[int, nn.Module]:
    """The pipeline's transformers by stage: 0 is `transformer`, 1 is `transformer_2`, which takes over below a boundary.

    Raises InstallError if there is none, if the two are of different classes, or if the pipeline has no
    `boundary_ratio` to say when the second takes over.
    """
    named = (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None))
    found = {stage: transformer for stage, transformer in enumerate(named) if transformer is not None}
    if not found:
        raise InstallError(f"{type(pipe).__name__} has no transformer to cache (a U-Net is not supported)")
    if len({type(transformer) for transformer in found.values()}) > 1:
        raise InstallError(f"{type(pipe).__name__} has two transformers of different classes, which is not supported")
    if 1 in found and "boundary_ratio" not in pipe.config:
        raise InstallError(
            f"it is not known when transformer_2 of {type(pipe).__name__} runs: it has no boundary_ratio"
        )
    return found


def find_denoiser(pipe: Any) -> nn.Module:
    """The first of the pipeline's transformers: for what both have in common, class and dtype. See `find_denoisers`."""
    return next(iter(find_denoisers(pipe).values()))


def single_denoiser(pipe: Any) -> nn.Module:
    """The pipeline's only transformer. Raises InstallError where there are two (Wan 2.2): see `find_denoisers`."""
    found = find_denoisers(pipe)
    if len(found) > 1:
        raise InstallError(
            f"{type(pipe).__name__} has two transformers, and this cache knows pipelines with one: use a plan "
            "(erta.cached), or leave transformer_2 out"
        )
    return next(iter(found.values()))


def takeover_step(pipe: Any, timesteps: torch.Tensor) -> int | None:
    """The step from which `transformer_2` runs, out of a call's timesteps; None without one.

    0 if it runs from the first step on, len(timesteps) if it never does. A pipeline whose `boundary_ratio` is None
    runs its first transformer only.
    """
    if 1 not in find_denoisers(pipe):
        return None
    boundary = boundary_ratio(pipe) * pipe.scheduler.config.num_train_timesteps
    return int((timesteps >= boundary).sum())


def boundary_ratio(pipe: Any) -> float:
    """0 where there is none: no timestep lies below it."""
    return float(pipe.config.boundary_ratio or 0.0)
