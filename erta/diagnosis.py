"""Where a cached run's error comes from: an exact split, and how much an error at each step grows.

ERTACache, Eq. 11, speaks of a feature shift `err` and of its amplification by the steps. Here the measured
difference of the final latents is split without approximation. A solver's step is linear in the sample and in
the model's outputs (Euler, UniPC, DPM-Solver++), so a whole run is a linear map S of noise and outputs, and
with u the outputs that the cached run used, v(xc) and v(x) the model's on the cached and uncached trajectory,

    xc[N] - x[N] = S(0, u - v(xc))  +  S(0, v(xc) - v(x))  +  S(noise, v(x)) - S_nominal(noise, v(x))
                      injected            propagated              grid
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from erta.architectures import Architecture, architecture_of
from erta.coefficients import Coefficients
from erta.errors import ErtaError
from erta.guidance import branches_of, combining_scale_of, guide, known_pair, second_scale_of, split
from erta.hooks import observed
from erta.pipeline import Session, call_arguments, find_denoiser, latent_call
from erta.plan import Plan
from erta.scheduler import first_index
from erta.session import cached, planned_session
from erta.site import SeenForward, Site, make_site
from erta.trajectories import steps_shown

DIRECTION_STRIDE = 100_000  # between the seeds of the directions
_Scales = tuple[float | None, float | None]


@dataclass(frozen=True)
class Decomposition:
    """The split of one run's error. A share is a part's projection on the total, over the total: they sum to 1.

    Attributes:
        total_norm: L2 norm of `xc[N] - x[N]`.
        norms, shares: of `injected`, `propagated` and `grid`.
        injected_by_step, propagated_by_step: the shares of each step's outputs, (num_steps,).
        open_loop_norm: of the errors that the same reuse makes on the *uncached* trajectory, carried to the end
            by the solver alone. Another quantity: no part of the total.
        closure: norm of what the parts leave over, relative to the total (rounding).
    """

    total_norm: float
    norms: dict[str, float]
    shares: dict[str, float]
    injected_by_step: np.ndarray
    propagated_by_step: np.ndarray
    open_loop_norm: float
    closure: float


def decompose(pipe: Any, plan: Plan, prompt: str, *, seed: int = 0, **pipeline_kwargs: Any) -> Decomposition:
    """Split the error of one cached run against the uncached run from the same noise (ERTACache, Eq. 11, made exact).

    Costs two uncached runs: at reused steps the model is evaluated as well. Raises what `erta.cached` raises, and
    ErtaError for schedulers without sigmas and for guidance branches without names.
    """
    if not hasattr(pipe.scheduler, "step_index"):
        raise ErtaError(f"{type(pipe.scheduler).__name__} does not step along sigmas: its error is not split")
    if plan.branches is not None and len(plan.branches) > 1 and not known_pair(plan.branches):
        raise ErtaError(
            f"this pipeline does not name its guidance branches, which are {list(plan.branches)} here: its error is not split. "
            "Switch guidance off"
        )
    reused = _run_cached(pipe, plan, prompt, seed, pipeline_kwargs)  # first, since it checks the call against the plan
    uncached = _run_uncached(pipe, plan, prompt, seed, pipeline_kwargs)
    steps = range(plan.num_steps)
    injected = [reused.outputs[i] - reused.truth[i] for i in steps]
    propagated = [reused.truth[i] - uncached.outputs[i] for i in steps]
    zero = torch.zeros_like(uncached.noise)
    total = reused.latents - uncached.latents
    parts = {
        "injected": reused.integrate(zero, injected),
        "propagated": reused.integrate(zero, propagated),
        "grid": reused.integrate(uncached.noise, uncached.outputs)
        - uncached.integrate(uncached.noise, uncached.outputs),
    }
    size = total.norm().clamp_min(torch.finfo(torch.float64).tiny)

    def share(part: torch.Tensor) -> float:
        return float((part * total).sum() / size**2)

    def by_step(errors: list[torch.Tensor]) -> np.ndarray:
        alone = ([error if i == k else zero for i, error in enumerate(errors)] for k in steps)
        return np.array([share(reused.integrate(zero, errors)) for errors in alone])

    return Decomposition(
        total_norm=float(total.norm()),
        norms={name: float(part.norm()) for name, part in parts.items()},
        shares={name: share(part) for name, part in parts.items()},
        injected_by_step=by_step(injected),
        propagated_by_step=by_step(propagated),
        open_loop_norm=float(reused.integrate(zero, uncached.open_loop_errors).norm()),
        closure=float((total - sum(parts.values())).norm() / size),
    )


def propagation_gain(
    pipe: Any,
    prompt: str,
    after_steps: list[int],
    *,
    seed: int = 0,
    directions: int = 1,
    along: bool = False,
    relative_size: float = 1e-3,
    **pipeline_kwargs: Any,
) -> np.ndarray:
    """How much a small error in the latent after each of `after_steps` has grown at the end, uncached.

    Finite differences: one run for each step and direction, with an error of `relative_size` of the latent's norm. How much
    it grows depends on the prompt and on the direction by orders of magnitude: one of each is no measurement.

    Under UniPC it is something else: its corrector computes the latent anew from that of the step before, so that what was put
    into this one is dropped, and only what the model made of it goes on. Under Euler's rule, the whole of it goes on.

    Args:
        after_steps: -1 is before the first step: the error is in the noise.
        directions: random ones, the same for every prompt.
        along: in place of random ones, the one direction of the trajectory's own last move (after -1: of its first).

    Returns the growth, (steps, directions).
    """
    moves: list[torch.Tensor] = []  # latents, from the noise on

    def look(output: torch.Tensor, latent: torch.Tensor, after: torch.Tensor) -> None:
        moves.extend([latent, after] if not moves else [after])

    def error_in(latents: torch.Tensor, step: int, direction: int) -> torch.Tensor:
        if along:
            error = moves[max(step, 0) + 1] - moves[max(step, 0)]
        else:
            noise = torch.Generator().manual_seed(step + DIRECTION_STRIDE * direction)
            error = torch.randn(latents.shape, generator=noise).to(latents)
        return error * (relative_size * latents.norm() / error.norm())

    def disturbed_end(changed: int, direction: int) -> tuple[torch.Tensor, float]:
        size = 0.0

        def disturb(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal size
            if step != changed:
                return {}
            latents = values["latents"]
            other = latents + error_in(latents, step, direction)
            size = float((other - latents).float().norm())  # after rounding to the latents' dtype
            return {"latents": other}

        call = {**pipeline_kwargs, "callback_on_step_end": disturb}
        if changed < 0:
            other = moves[0] + error_in(moves[0], -1, direction)
            size, call = float((other - moves[0]).float().norm()), {**pipeline_kwargs, "latents": other}
        latents = _final_latents(pipe(**latent_call(prompt, seed, call)))
        if size == 0:
            raise ErtaError(f"there is no step {changed} to disturb, or {relative_size:g} is lost in rounding")
        return latents, size

    with steps_shown(pipe, look):
        undisturbed = _final_latents(pipe(**latent_call(prompt, seed, pipeline_kwargs)))
    gains = np.empty((len(after_steps), 1 if along else directions))
    for place, step in enumerate(after_steps):
        for direction in range(gains.shape[1]):
            disturbed, size = disturbed_end(step, direction)
            gains[place, direction] = float((disturbed - undisturbed).norm()) / size
    return gains


def reuse_error_by_channel(pipe: Any, plan: Plan, prompt: str, *, seed: int = 0, **pipeline_kwargs: Any) -> np.ndarray:
    """Mean absolute error of what reused steps return before rectification, by latent channel (ERTACache, Figure 6).

    Along the cached trajectory, over all reused steps, guidance branches and places. Costs an uncached run.

    Returns (channels,), in units of the model's output. Raises what `erta.cached` raises, ErtaError if nothing is reused.
    """
    architecture, sums = architecture_of(find_denoiser(pipe)), []

    def note(step: int, context: str, v_cached: torch.Tensor, true_velocity: Callable[[], torch.Tensor]) -> None:
        error = (v_cached - true_velocity()).abs().double()
        axis = architecture.channel_axis_of(error)
        sums.append(error.mean(dim=[d for d in range(error.ndim) if d != axis]))

    with cached(pipe, plan):
        planned_session(pipe).show_reuse(note)
        pipe(**latent_call(prompt, seed, pipeline_kwargs))
    if not sums:
        raise ErtaError("this plan reuses nothing, so there is no error to look at")
    return torch.stack(sums).mean(0).cpu().numpy()


class _Run:
    """What the scheduler was given in one run, and the scheduler as it stood before the first step."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []  # guided, float64
        self.truth: list[torch.Tensor] = []  # the model's own guided outputs at the same inputs
        self.open_loop_errors: list[torch.Tensor] = []
        self.scheduler: Any = None
        self.noise = self.latents = torch.empty(0)

    def integrate(self, noise: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The solver alone over given outputs: linear in noise and outputs together."""
        scheduler, x = copy.deepcopy(self.scheduler), noise
        for timestep, output in zip(scheduler.timesteps[first_index(scheduler) :], outputs, strict=True):
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        return x.double()


def _record(session: Session, run: _Run) -> None:
    """Note what the scheduler of the session's calls is given at every step."""

    def note(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if run.scheduler is None:
            run.scheduler = copy.deepcopy(scheduler)
            del run.scheduler.step  # the solver's own, which notes nothing
            run.noise = sample.double()
        run.outputs.append(model_output.double())

    session.show_step = note


class _OpenLoop:
    """Errors that a plan's reuse makes on the uncached trajectory, guided, one a step."""

    def __init__(self, plan: Plan, guidance_scales: _Scales, architecture: Architecture) -> None:
        self.plan, self.guidance_scales = plan, guidance_scales
        self.stages: dict[int, int] = {}
        self.coefficients = Coefficients(plan, architecture)
        self.kept: dict[str, torch.Tensor] = {}
        self.errors: list[dict[str, torch.Tensor]] = [{} for _ in plan.mask]

    def observe(self, forward: SeenForward) -> None:
        """Note the error that reuse would make at this forward."""
        step, branch, velocity = forward.step, forward.branch, forward.velocity
        self.stages[step] = forward.stage
        if self.plan.mask[step]:  # and so is a second transformer's first step: nothing of the first's is left
            self.kept[branch] = velocity if self.plan.reuse == "velocity" else forward.residual
            error = torch.zeros_like(velocity)
        else:
            error = self.coefficients.rectify(forward.predict(self.kept[branch]), step, branch) - velocity
        self.errors[step] |= split(error.double(), branches_of(branch, self.guidance_scales[0]))

    def guided(self) -> list[torch.Tensor]:
        """One error a step, as the solver sees it."""
        scales = self.guidance_scales
        return [guide(errors, scales[self.stages[step]]) for step, errors in enumerate(self.errors)]


def _run_uncached(pipe: Any, plan: Plan, prompt: str, seed: int, kwargs: dict[str, Any]) -> _Run:
    run = _Run()
    open_loop = _OpenLoop(plan, _guidance_scales(pipe, prompt, kwargs), architecture_of(find_denoiser(pipe)))

    def site_of(transformer: nn.Module) -> Site:
        return make_site(plan.site, transformer, plan.reuse)

    with observed(pipe, open_loop.observe, site_of) as session:
        _record(session, run)
        run.latents = _final_latents(pipe(**latent_call(prompt, seed, kwargs)))
    run.open_loop_errors = open_loop.guided()
    return run


def _run_cached(pipe: Any, plan: Plan, prompt: str, seed: int, kwargs: dict[str, Any]) -> _Run:
    run, scales = _Run(), _guidance_scales(pipe, prompt, kwargs)
    true: dict[int, dict[str, torch.Tensor]] = {}

    def note(step: int, context: str, v_cached: torch.Tensor, true_velocity: Callable[[], torch.Tensor]) -> None:
        parts = split(true_velocity().double(), branches_of(context, scales[0]))
        true.setdefault(step, {}).update(parts)

    with cached(pipe, plan) as trace:
        session = planned_session(pipe)
        session.show_reuse(note)
        _record(session, run)
        run.latents = _final_latents(pipe(**latent_call(prompt, seed, kwargs)))
    if true and next(iter(next(iter(true.values())).values())).shape != run.outputs[0].shape:
        raise ErtaError("the solver is given a part of what the transformer makes (references): its error is not split")
    for step, output in enumerate(run.outputs):
        run.truth.append(guide(true[step], scales[trace.stages[step]]) if step in true else output)
    return run


def _guidance_scales(pipe: Any, prompt: str, kwargs: dict[str, Any]) -> _Scales:
    """Of the first and the second transformer."""
    arguments = call_arguments(type(pipe), pipe, (), {**kwargs, "prompt": prompt})
    return combining_scale_of(arguments), second_scale_of(arguments)


def _final_latents(result: Any) -> torch.Tensor:
    """Latents of a pipeline's result, float64, whatever the field is called."""
    return result[0].double()
