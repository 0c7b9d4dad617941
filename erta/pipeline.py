"""A diffusers pipeline as the library sees it: its transformers, its call, and the session that is put on it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError
from erta.trace import CallTrace

SESSION = "_erta_session"


def latent_call(prompt: str, seed: int, pipeline_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call that ends in latents, from the noise of a CPU generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return {"output_type": "latent", "generator": generator, **pipeline_kwargs, "prompt": prompt}


def call_arguments(pipe_class: type, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline call with the pipeline's defaults filled in."""
    bound = inspect.signature(pipe_class.__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


class Session:
    """What happens around every call of one pipeline object, and what must be put back. The one way on and off a pipeline.

    The object gets a subclass of its own class, with the same name, whose call goes through `call`, and the scheduler that the
    cache runs with. Other objects of that class stay as they are.
    """

    refusal = "erta is installed on this pipeline already: call erta.uninstall(pipe) first"

    def __init__(self, pipe: Any, scheduler: Any, trace: CallTrace) -> None:
        self.pipe_class, self.own_scheduler = type(pipe), pipe.scheduler
        self.scheduler, self.trace = scheduler, trace

    def put_on(self, pipe: Any) -> None:
        """From now on calls of `pipe` are this session's."""
        base, session = self.pipe_class, self

        @functools.wraps(base.__call__)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return session.call(self, *args, **kwargs)

        pipe.scheduler = self.scheduler
        pipe.__class__ = type(base.__name__, (base,), {"__call__": __call__, "__module__": base.__module__})
        pipe.__dict__[SESSION] = self

    def take_off(self, pipe: Any) -> None:
        """Put class and scheduler back; does nothing if another session, or none, is on."""
        if pipe.__dict__.get(SESSION) is not self:
            return
        pipe.scheduler, pipe.__class__ = self.own_scheduler, self.pipe_class
        del pipe.__dict__[SESSION]

    def call(self, pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, with the state cleared before and what was executed checked after."""
        self.before_call(pipe, args, kwargs)
        self.trace.begin()
        result = self.pipe_class.__call__(pipe, *args, **kwargs)
        self.trace.finish()
        return result

    def before_call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """To be overridden: check the arguments, forget what an aborted call left behind."""


def check_bare(pipe: Any) -> None:
    """Raise InstallError, with what to do, if a session is on this pipeline object."""
    if SESSION in pipe.__dict__:
        raise InstallError(pipe.__dict__[SESSION].refusal)


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
