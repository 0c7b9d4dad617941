"""What searched schedules share: the plan of a mask, runs under it, and recorded trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

import erta
from erta.online import Call
from erta.pipeline import latent_call, single_denoiser
from erta.policy import Mask
from experiments.harness import catalogue
from experiments.harness.arm import Arm, make_arm
from experiments.harness.calibrations import CALIBRATION_SEED
from experiments.harness.config import BUDGETS
from experiments.harness.setup import Setup
from experiments.methods.common.recorders import Recorder


def plan_of(setup: Setup, mask: Mask, report: dict[str, Any]) -> erta.Plan:
    """A plan with this mask on the pipeline's own grid, at `cache.site`, without rectification.

    Raises InstallError on two transformers: no search knows that a step must be computed where the second takes over.
    """
    single_denoiser(setup.pipe)
    grid = setup.grid
    return erta.Plan(
        mask=mask,
        sigmas=grid.sigmas,
        nominal_sigmas=grid.sigmas,
        site=setup.cfg.cache.site,
        reuse=setup.cfg.cache.reuse,
        corrector_at_reused=setup.cfg.cache.corrector_at_reused,
        report={"policy": setup.cfg.cache.name, **report},
    )


def planned_arm(setup: Setup, mask: Mask, report: dict[str, Any]) -> Arm:
    """The arm of a searched mask."""
    return Arm(plan_of(setup, mask, report), setup.kwargs, report=report)


def grid_arm(setup: Setup, mask: Mask, report: dict[str, Any]) -> Arm:
    """The pipeline's own solver on the sigmas of a mask's steps, without a cache."""
    grid = plan_of(setup, mask, {**report, "mask": [int(on) for on in mask]}).grid_only()
    return Arm(grid, {**setup.kwargs, "num_inference_steps": grid.num_steps})


def trial_runs(setup: Setup) -> Callable[[Mask | None], torch.Tensor]:
    """What runs the first calibration prompt under a mask (None: uncached) and gives its final latents, in float32."""
    pipe, prompt = setup.pipe, setup.calibration_prompts[0]
    whole = plan_of(setup, (True,) * setup.cfg.model.num_inference_steps, {})

    def run(mask: Mask | None) -> torch.Tensor:
        with nullcontext() if mask is None else erta.cached(pipe, replace(whole, mask=mask)):
            made = pipe(**latent_call(prompt, CALIBRATION_SEED, setup.kwargs))
        return torch.as_tensor(made.frames if hasattr(made, "frames") else made.images).float()

    return run


class TrajectoryRecorder(Recorder):
    """Input, output and residual of every step by branch, on the CPU."""

    def begin(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        step = tuple(value.float().cpu() for value in (call.x, velocity, residual))
        self.seen.setdefault(call.branch, []).append(step)  # type: ignore[arg-type]


def arm_of(setup: Setup, name: str) -> Arm:
    """The arm of another method with its own options, at the same budget and site."""
    cfg = copy.deepcopy(setup.cfg)
    cfg.cache = catalogue.configuration(name)
    for key in (*BUDGETS, "site", "reuse"):
        cfg.cache[key] = setup.cfg.cache[key]
    return make_arm(setup.with_cache(cfg))
