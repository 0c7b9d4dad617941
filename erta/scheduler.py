"""The plan's time grid, put under an unmodified pipeline through its scheduler.

A planned scheduler is a copy of the pipeline's own with one method overridden: `set_timesteps` checks that
the run is the one that was planned, then writes the plan's sigmas and timesteps. All else, the solver's
arithmetic above all, stays the scheduler's own.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import torch

from erta.errors import ErtaError, InstallError, SignatureMismatch
from erta.plan import Plan
from erta.policy import Mask


def step_index(scheduler: Any) -> int:
    """The step that the scheduler will carry out next. Counting calls would go wrong with two transformers."""
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index  # before the first step
    return 0 if index is None else int(index)


def has_sigmas(scheduler: Any) -> bool:
    """Whether a scheduler, after `set_timesteps`, integrates over sigmas, one a step and the end."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    return sigmas is not None and timesteps is not None and len(sigmas) == len(timesteps) + 1


def nominal_sigmas(scheduler: Any) -> np.ndarray:
    """The grid of a scheduler after `set_timesteps`, float32 (num_steps + 1,), strictly decreasing.

    Schedulers without sigmas (CogVideoX's DDIM and DPM) give `(timestep + 1) / training timesteps` and 0: good to
    tell grids apart, not to be moved. Raises ErtaError before `set_timesteps`.
    """
    if has_sigmas(scheduler):
        return np.asarray(torch.as_tensor(scheduler.sigmas).detach().float().cpu())
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
        raise ErtaError(f"{type(scheduler).__name__} has no grid of steps yet")
    times = (torch.as_tensor(timesteps).detach().float().cpu() + 1) / scheduler.config.num_train_timesteps
    return np.append(times.numpy(), np.float32(0))


def counting(scheduler: Any) -> Any:
    """The scheduler itself if it counts its steps, else a copy that does (CogVideoX's keep no index)."""
    if hasattr(scheduler, "step_index"):
        return scheduler
    base = type(scheduler)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        self.step_index = 0

    @functools.wraps(base.step)  # pipelines inspect its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = base.step(self, *args, **kwargs)
        self.step_index += 1
        return result

    counted = copy.deepcopy(scheduler)
    methods = {"set_timesteps": set_timesteps, "step": step, "step_index": 0, "__module__": base.__module__}
    counted.__class__ = type(base.__name__, (base,), methods)
    return counted


def planned_scheduler(scheduler: Any, plan: Plan) -> Any:
    """A copy of `scheduler` that runs the plan's grid; the original is left alone.

    Raises InstallError if the corrector is to be switched off at reused steps and the solver has none to switch.
    """
    scheduler = counting(scheduler)
    base = type(scheduler)

    @functools.wraps(base.set_timesteps)  # pipelines inspect the signature for `sigmas`
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        _check_grid_is_planned(self, plan)
        write_grid(self, plan.sigmas)

    planned = copy.deepcopy(scheduler)
    planned.__class__ = type(base.__name__, (base,), {"set_timesteps": set_timesteps, "__module__": base.__module__})
    if not plan.corrector_at_reused and plan.num_computed < plan.num_steps:
        switch_off_corrector(planned, plan.mask)
    return planned


def _check_grid_is_planned(scheduler: Any, plan: Plan) -> None:
    found = nominal_sigmas(scheduler)
    if len(found) - 1 != plan.num_steps:
        raise SignatureMismatch("num_inference_steps", plan.num_steps, len(found) - 1)
    if plan.nominal_sigmas is not None and not np.array_equal(found, np.asarray(plan.nominal_sigmas, np.float32)):
        raise SignatureMismatch("sigmas", _ends(plan.nominal_sigmas), _ends(found))


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


def write_grid(scheduler: Any, grid: np.ndarray) -> None:
    """Overwrite sigmas and timesteps where they change: equal entries keep the original bits.

    `grid` is (num_steps + 1,). Raises InstallError for a scheduler without sigmas.
    """
    grid = np.asarray(grid, np.float32)
    changed = grid != nominal_sigmas(scheduler)
    if not changed.any():
        return
    if not has_sigmas(scheduler):
        raise InstallError(f"{type(scheduler).__name__} has no sigmas to move: plan without adjusting the grid")
    train_steps = scheduler.config.num_train_timesteps
    sigmas, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    for step in np.flatnonzero(changed).tolist():
        value = float(grid[step])
        sigmas[step] = value
        if step < len(timesteps):
            exact = value * train_steps
            timesteps[step] = exact if timesteps.dtype.is_floating_point else math.floor(exact + 1e-4)
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps


def switch_off_corrector(scheduler: Any, mask: Mask) -> None:
    """UniPC without its corrector at reused steps. Raises InstallError for a solver that has none to switch."""
    listed = getattr(scheduler, "disable_corrector", None)
    if listed is None:
        raise InstallError(
            f"{type(scheduler).__name__} has no corrector to switch off at reused steps: leave corrector_at_reused=True"
        )
    # UniPC skips the corrector at step k + 1 for every k listed
    reused = [step - 1 for step, computed in enumerate(mask) if not computed]
    scheduler.disable_corrector = sorted({*listed, *reused})


def _ends(sigmas: np.ndarray) -> str:
    return f"{len(sigmas)} values, {sigmas[0]:.4f}, {sigmas[1]:.4f} … {sigmas[-2]:.4f}, {sigmas[-1]:.4f}"
