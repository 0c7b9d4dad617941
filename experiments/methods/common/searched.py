"""What searched schedules share: the plan of a mask, runs under it, and recorded trajectories."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

import erta
from erta.online import Call
from erta.pipeline import latent_call, single_denoiser
from erta.policy import Mask
from experiments.harness.arm import Arm
from experiments.harness.calibrations import CALIBRATION_SEED, prompts_for
from experiments.methods.common.recorders import Recorder
from experiments.models.call import call_grid, call_kwargs


def plan_of(cfg: DictConfig, pipe: Any, mask: Mask, report: dict[str, Any]) -> erta.Plan:
    """A plan with this mask on the pipeline's own grid, at `cache.site`, without rectification.

    Raises InstallError on two transformers: no search knows that a step must be computed where the second takes over.
    """
    single_denoiser(pipe)
    grid = call_grid(pipe, call_kwargs(cfg))
    return erta.Plan(
        mask=mask,
        sigmas=grid.sigmas,
        nominal_sigmas=grid.sigmas,
        site=cfg.cache.site,
        reuse=cfg.cache.reuse,
        corrector_at_reused=cfg.cache.corrector_at_reused,
        report={"policy": cfg.cache.name, **report},
    )


def planned_arm(cfg: DictConfig, pipe: Any, mask: Mask, report: dict[str, Any]) -> Arm:
    """The arm of a searched mask."""
    return Arm(plan_of(cfg, pipe, mask, report), call_kwargs(cfg), report=report)


def trial_runs(cfg: DictConfig, pipe: Any) -> Callable[[Mask | None], torch.Tensor]:
    """What runs the first calibration prompt under a mask (None: uncached) and gives its final latents, in float32.

    The grid and the prompt are looked up once for all runs of a search.
    """
    prompt, whole = prompts_for(cfg, pipe)[0], plan_of(cfg, pipe, (True,) * cfg.model.num_inference_steps, {})

    def run(mask: Mask | None) -> torch.Tensor:
        with nullcontext() if mask is None else erta.cached(pipe, replace(whole, mask=mask)):
            made = pipe(**latent_call(prompt, CALIBRATION_SEED, call_kwargs(cfg)))
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
