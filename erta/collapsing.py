"""A plan as a solver: what a static cache does, without the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from erta.architectures import architecture_of
from erta.errors import ErtaError
from erta.fitted_scheduler import FittedScheduler, model_of
from erta.pipeline import find_denoiser
from erta.plan import Plan
from erta.policy import Mask, sources
from erta.rectifier import Moments, fit_linear
from erta.scheduler import switch_off_corrector, with_grid, write_grid
from erta.signature import check_signature, model_signature
from erta.solver import Predict, WithOffset, linear_solver, reuse_residual, reuse_velocity
from erta.solver_files import MadeFor
from erta.trajectories import Trajectories


def collapse(pipe: Any, plan: Plan, trajectories: Trajectories | None = None) -> FittedScheduler:
    """The K-step solver that a static plan at `site=output` amounts to, on this pipeline's scheduler.

        pipe.scheduler = erta.collapse(pipe, plan)
        frames = pipe(prompt, num_inference_steps=plan.num_computed, ...).frames

    The result is that of `erta.cached(pipe, plan)` to rounding, with K iterations in place of N, and nothing on the transformer.

    A rectifier whose coefficients differ by guidance branch is no function of the guided output, which is all that a solver
    sees. In its place one is fitted to the guided output along `trajectories` (`erta.record`).

    Raises ErtaError for `site=blocks`, for a part of a schedule, for a pipeline that gives its solver something else than
    velocities, for the sigmoid form, for a rectifier that differs by branch without trajectories, and for a scheduler that is not
    linear; SignatureMismatch for a plan of another model.
    """
    if plan.site != "output":
        raise ErtaError(f"site={plan.site} runs parts of the transformer at reused steps: only site=output is a solver")
    if plan.begin:
        raise ErtaError("this plan is for a part of a schedule (strength below 1): only whole schedules are solvers")
    given = (plan.signature or {}).get("given_to_solver", "velocity")
    if given == "else" or (given == "negated" and plan.reuse == "residual"):
        raise ErtaError(
            f"{type(pipe).__name__} does not give its solver the guided velocity, but "
            + ("the same negated: plan with reuse='velocity'" if given == "negated" else "something else made of it")
            + ", so that this plan is no solver. Use erta.cached"
        )
    if plan.signature is not None:
        check_signature(plan.signature, model_signature(pipe))
    nominal = plan.sigmas if plan.nominal_sigmas is None else plan.nominal_sigmas
    scheduler = with_grid(pipe.scheduler, nominal)
    write_grid(scheduler, plan.sigmas)
    if not plan.corrector_at_reused and not all(plan.mask):
        switch_off_corrector(scheduler, plan.mask)
    predict: Predict = reuse_residual if plan.reuse == "residual" else reuse_velocity
    channels, fitted_anew = 1, False
    if plan.rectification is not None and not all(plan.mask):
        gain, offset, fitted_anew = _rectifier_of(plan, trajectories)
        channels, predict = gain.shape[1], WithOffset(predict, gain, offset)
    report = {**plan.report, "collapsed_from_steps": plan.num_steps, "rectifier_of_guided_output": fitted_anew}
    solver = linear_solver(scheduler, plan.mask, nominal, predict, channels, report)
    return FittedScheduler(solver, pipe.scheduler, _made_for(pipe, plan))


def _made_for(pipe: Any, plan: Plan) -> MadeFor:
    axis = -1
    if plan.latent_shape is not None:
        latent = torch.empty((1, *plan.latent_shape), device="meta")
        axis = architecture_of(find_denoiser(pipe)).channel_axis_of(latent) - latent.ndim
    takeover = None if plan.takeover is None else sum(plan.mask[: plan.takeover])
    return MadeFor(channel_axis=axis, takeover=takeover, model=model_of(pipe))


def _rectifier_of(plan: Plan, trajectories: Trajectories | None) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gain and offset of the guided output, (num_steps, channels or 1) each, and whether they were fitted anew."""
    rect = plan.rectification
    assert rect is not None
    if rect.form != "linear":
        raise ErtaError(f"a rectifier of the form {rect.form!r} is not linear, so the plan is no linear solver")
    if (rect.gain == rect.gain[:, :1]).all() and (rect.offset == rect.offset[:, :1]).all():
        return _narrowed(rect.gain[:, 0]), _narrowed(rect.offset[:, 0]), False
    if trajectories is None:
        raise ErtaError(
            "this plan's rectifier differs by guidance branch, and a solver sees the guided output alone: give trajectories "
            "(erta.record), and one is fitted to the guided output; or plan with rectify=False"
        )
    if plan.nominal_sigmas is None or not np.allclose(trajectories.sigmas, plan.nominal_sigmas, atol=1e-6):
        raise ErtaError("the trajectories are of another grid than the plan: record them with the same call")
    by_channel = _narrowed(rect.gain[:, 0]).shape[1] > 1
    return *guided_rectifier(trajectories, plan.mask, plan.reuse, by_channel), True


def guided_rectifier(
    trajectories: Trajectories, mask: Mask, reuse: str = "residual", by_channel: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Gain and offset, (num_steps, channels or 1), fitted to the guided output along uncached trajectories."""
    names = trajectories.channels if by_channel else np.zeros_like(trajectories.channels)
    gain, offset = np.ones((2, len(mask), int(names.max()) + 1))
    offset = np.zeros_like(gain)
    x, v = trajectories.latents.astype(np.float64), trajectories.outputs.astype(np.float64)
    for step, source in enumerate(sources(mask)):
        if source == step:
            continue
        cached = v[:, source] if reuse == "velocity" else x[:, step] + v[:, source] - x[:, source]
        fit = fit_linear(_moments(cached, cached - v[:, step], names))
        gain[step], offset[step] = fit.gain, fit.offset
    return gain, offset


def _narrowed(table: np.ndarray) -> np.ndarray:
    """(num_steps, channels), or (num_steps, 1) where all channels have one value."""
    return table[:, :1] if (table == table[:, :1]).all() else table


def _moments(cached: np.ndarray, error: np.ndarray, channels: np.ndarray) -> Moments:
    """Moments by channel, (channels,) each, of values (P, M) and their channels (M,)."""
    sums = []
    for channel in range(int(channels.max()) + 1):
        v, e = cached[:, channels == channel].ravel(), error[:, channels == channel].ravel()
        if not len(v):
            raise ErtaError(f"no sampled position lies in channel {channel}: record with more positions")
        dv, de = v - v.mean(), e - e.mean()
        sums.append([len(v), v.mean(), e.mean(), dv @ dv, dv @ de, de @ de])
    return Moments(*np.array(sums, float).T)
