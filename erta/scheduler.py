"""The plan's time grid, put under an unmodified pipeline through its scheduler.

A planned scheduler is a copy of the pipeline's own, of the same class, with one method overridden: `set_timesteps` checks
that the run is the one that was planned, then writes the plan's sigmas and timesteps. All else, the solver's arithmetic
above all, stays the scheduler's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from erta.errors import ErtaError, InstallError, SignatureMismatch
from erta.plan import Plan
from erta.policy import Mask


def step_index(scheduler: Any) -> int:
    """The place in its grid of the step that the scheduler will carry out next. Counting calls goes wrong with two transformers."""
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index  # before the first step
    return 0 if index is None else int(index)


def first_index(scheduler: Any) -> int:
    """The place in its grid where the run begins: not 0 where a pipeline runs a part of it (image-to-image, by its strength)."""
    return int(getattr(scheduler, "begin_index", None) or 0)


def settle_start(scheduler: Any, num_timesteps: int | None) -> None:
    """Tell a scheduler before its first step that the pipeline runs only its last `num_timesteps`, if nobody did.

    Some pipelines of a part of a schedule leave it to the scheduler to find its place by the timestep of the first step, which
    is after the first forward. The place is the same.
    """
    skipped = 0 if num_timesteps is None else len(scheduler.timesteps) - num_timesteps
    if skipped <= 0 or getattr(scheduler, "begin_index", None) is not None:
        return
    if "step_index" in vars(scheduler):  # see `counting`
        scheduler.step_index = scheduler.begin_index = skipped
    elif scheduler.step_index is None:
        scheduler.set_begin_index(skipped)


def has_sigmas(scheduler: Any) -> bool:
    """Whether a scheduler, after `set_timesteps`, integrates over sigmas, one a step and the end."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    return sigmas is not None and timesteps is not None and len(sigmas) == len(timesteps) + 1


def has_movable_sigmas(scheduler: Any) -> bool:
    """Whether the time that the model is told is its sigma, so that a step can be moved: flow matching, and not noise levels."""
    if not has_sigmas(scheduler):
        return False
    sigmas = torch.as_tensor(scheduler.sigmas).detach().double().cpu()[:-1]
    times = torch.as_tensor(scheduler.timesteps).detach().double().cpu()
    return bool(((sigmas * scheduler.config.num_train_timesteps - times).abs() <= 1).all())  # some round them


def nominal_sigmas(scheduler: Any) -> np.ndarray:
    """The grid of a scheduler after `set_timesteps`, float32 (num_steps + 1,), strictly decreasing.

    Schedulers without sigmas (CogVideoX's DDIM and DPM) give `(timestep + 1) / training timesteps` and 0: good to
    tell grids apart, not to be moved. Raises ErtaError before `set_timesteps`.
    """
    if has_sigmas(scheduler):
        return np.array(
            torch.as_tensor(scheduler.sigmas).detach().float().cpu()
        )  # a copy: some pipelines write into it
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        raise ErtaError(f"{type(scheduler).__name__} has no grid of steps yet")
    times = torch.as_tensor(timesteps).detach().float().cpu()[: scheduler.num_inference_steps]  # SCM's hold the end too
    times = (times + 1) / scheduler.config.num_train_timesteps
    return np.append(times.numpy(), np.float32(0))


def check_one_forward_a_step(scheduler: Any, sigmas: np.ndarray) -> None:
    """Raise ErtaError for a solver that asks for more than one output a step, or whose grid does not fall (Heun, KDPM2)."""
    if (np.diff(sigmas) >= 0).any():
        raise ErtaError(
            f"{type(scheduler).__name__} does not go down its grid one forward a step (Heun-like solvers take two), so no "
            "plan can be made for it: use flow-match Euler, UniPC or DPM-Solver++"
        )


def check_start(scheduler: Any, plan: Plan) -> None:
    """Raise SignatureMismatch if a run begins at another place of its grid than the plan's."""
    begin = first_index(scheduler)
    if begin != plan.begin:
        total = len(nominal_sigmas(scheduler)) - 1
        planned = f"{plan.num_steps} of {plan.begin + plan.num_steps} steps"
        raise SignatureMismatch(
            "the part of the steps that runs (strength)", planned, f"{total - begin} of {total} steps"
        )


def counting(scheduler: Any) -> Any:
    """The scheduler itself if it counts its steps, else a copy that does (CogVideoX's keep no index)."""
    if hasattr(scheduler, "step_index"):
        return scheduler
    counted, base = copy.deepcopy(scheduler), type(scheduler)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.step_index, self.begin_index = 0, None

    @functools.wraps(base.step)  # pipelines inspect its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)
        self.step_index += 1
        return result

    counted.step_index, counted.begin_index = 0, None
    _override(counted, set_timesteps, step)
    return counted


def _override(scheduler: Any, *methods: Any) -> None:
    """Give one scheduler object methods of ours. Its class stays: pipelines ask for it (Bria compares it). Copies keep them."""
    for method in methods:
        setattr(scheduler, method.__name__, types.MethodType(method, scheduler))


ShowStep = Callable[[Any, torch.Tensor, torch.Tensor], None]
ShowGrid = Callable[[np.ndarray], None]
ShowResult = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def watched(
    scheduler: Any, show_step: ShowStep | None, show_grid: ShowGrid | None, show_result: ShowResult | None = None
) -> Iterator[None]:
    """Look at what a scheduler does inside the `with`.

    Args:
        show_step: called with (scheduler, model_output, sample) before every step.
        show_grid: called with `nominal_sigmas` as soon as the scheduler has a grid: some pipelines write into it (Cosmos 2).
        show_result: called with (model_output, sample, next sample) after every step.
    """

    def showing_step(own: Any) -> Any:
        signature = inspect.signature(own)

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not scheduler:  # but a copy by the pipeline (LTX-2, for the sound)
                return own(self, *args, **kwargs)
            given = signature.bind(self, *args, **kwargs).arguments
            output, sample = given["model_output"], given["sample"]
            if show_step is not None:
                show_step(self, output, sample)
            result = own(self, *args, **kwargs)
            if show_result is not None:
                show_result(output, sample, result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        return step

    def showing_grid(own: Any) -> Any:
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            own(self, *args, **kwargs)
            if show_grid is not None and self is scheduler:
                show_grid(nominal_sigmas(self))

        return set_timesteps

    with ExitStack() as stack:
        if show_step is not None or show_result is not None:
            stack.enter_context(_wrapped(scheduler, "step", showing_step))
        if show_grid is not None:
            stack.enter_context(_wrapped(scheduler, "set_timesteps", showing_grid))
        yield


@contextmanager
def _wrapped(scheduler: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """A method of one scheduler object in what `wrap` makes of it; pipelines that look see the same signature."""
    before, bound = scheduler.__dict__.get(name), getattr(scheduler, name)
    own = getattr(bound, "__func__", None) or functools.wraps(bound)(
        lambda self, *args, **kwargs: bound(*args, **kwargs)
    )
    _override(scheduler, functools.wraps(own)(wrap(own)))
    try:
        yield
    finally:
        del scheduler.__dict__[name]
        if before is not None:
            scheduler.__dict__[name] = before


def planned_scheduler(scheduler: Any, plan: Plan) -> Any:
    """A copy of `scheduler` that runs the plan's grid; the original is left alone.

    Raises InstallError if the corrector is to be switched off at reused steps and the solver has none to switch.
    """
    planned = copy.deepcopy(counting(scheduler))
    own = planned.set_timesteps

    @functools.wraps(own.__func__)  # pipelines inspect the signature for `sigmas`
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__func__(self, *args, **kwargs)
        _check_grid_is_planned(self, plan)
        write_grid(self, plan.sigmas, plan.begin)

    _override(planned, set_timesteps)
    if not plan.corrector_at_reused and plan.num_computed < plan.num_steps:
        switch_off_corrector(planned, plan.mask, plan.begin)
    return planned


def _check_grid_is_planned(scheduler: Any, plan: Plan) -> None:
    found = nominal_sigmas(scheduler)
    if len(found) - 1 != plan.begin + plan.num_steps:
        raise SignatureMismatch("num_inference_steps", plan.begin + plan.num_steps, len(found) - 1)
    runs = found[plan.begin :]
    if plan.nominal_sigmas is not None and not np.array_equal(runs, np.asarray(plan.nominal_sigmas, np.float32)):
        raise SignatureMismatch("sigmas", _ends(plan.nominal_sigmas), _ends(runs))


def with_grid(scheduler: Any, nominal: np.ndarray) -> Any:
    """A copy of a scheduler whose steps are those of a grid (num_steps + 1,). Raises ErtaError for one without sigmas.

    For schedulers whose grid a pipeline sets by the size of the image (FLUX): the grid is known, the shift is not.
    """
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(len(nominal) - 1, **({"mu": 1.0} if copied.config.get("use_dynamic_shifting") else {}))
    if not has_sigmas(copied):
        raise ErtaError(
            f"{type(scheduler).__name__} does not integrate over sigmas: there is no solver to take from it"
        )
    write_grid(copied, nominal)
    return copied


def write_grid(scheduler: Any, grid: np.ndarray, begin: int = 0) -> None:
    """Overwrite sigmas and timesteps where they change: equal entries keep the original bits.

    `grid` is (num_steps + 1,), of the steps from `begin` on. Raises InstallError for a scheduler without sigmas.
    """
    grid = np.asarray(grid, np.float32)
    changed = grid != nominal_sigmas(scheduler)[begin:]
    if not changed.any():
        return
    if not has_movable_sigmas(scheduler):
        raise InstallError(f"{type(scheduler).__name__} has no sigmas to move: plan without adjusting the grid")
    train_steps = scheduler.config.num_train_timesteps
    sigmas, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    for step in np.flatnonzero(changed).tolist():
        value = float(grid[step])
        sigmas[begin + step] = value
        if begin + step < len(timesteps):
            exact = value * train_steps
            timesteps[begin + step] = exact if timesteps.dtype.is_floating_point else math.floor(exact + 1e-4)
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps


def switch_off_corrector(scheduler: Any, mask: Mask, begin: int = 0) -> None:
    """UniPC without its corrector at reused steps; the mask is of those from `begin` on. Raises InstallError for a solver that has none to switch."""
    listed = getattr(scheduler, "disable_corrector", None)
    if listed is None:
        raise InstallError(
            f"{type(scheduler).__name__} has no corrector to switch off at reused steps: leave corrector_at_reused=True"
        )
    # UniPC skips the corrector at step k + 1 for every k listed
    reused = [begin + step - 1 for step, computed in enumerate(mask) if not computed]
    scheduler.disable_corrector = sorted({*listed, *reused})


def _ends(sigmas: np.ndarray) -> str:
    return f"{len(sigmas)} values, {sigmas[0]:.4f}, {sigmas[1]:.4f} … {sigmas[-2]:.4f}, {sigmas[-1]:.4f}"
