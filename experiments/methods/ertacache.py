"""ERTACache, whole or in parts, and uniform reuse."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

import erta
from erta.errors import ErtaError
from erta.policy import uniform_mask
from experiments.harness.arm import Arm, GetCalibration, step_count
from experiments.harness.calibrations import closed_loop_plan
from experiments.harness.config import budget
from experiments.models.call import call_grid, call_kwargs

PLAN_KEYS = (
    "policy",
    "rel_l1_denominator",
    "adjust_time",
    "phi_denominator",
    "time_form",
    "rectify",
    "rectifier",
    "rectifier_form",
    "corrector_at_reused",
    "reuse",
)


def arm(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """ERTACache (Peng et al., 2025, arXiv 2508.21091), whole or in parts, and uniform reuse, its ablation's first row.

    Site: `cache.site`, by default the output. Stored: the last residual, one in each guidance branch, where a later step
    reuses it. Static: the steps are planned from a calibration; evenly spread ones without adjustment and rectification
    need none. Where we differ: see `erta.plan` and the options of `cache`; sources disagree on several formulas.
    """
    cache = cfg.cache
    if cache.policy == "uniform" and not cache.adjust_time and not cache.rectify:
        grid = call_grid(pipe, call_kwargs(cfg))
        plan = erta.Plan(
            mask=uniform_mask(cfg.model.num_inference_steps, step_count(cfg, grid.takeover), grid.takeover),
            sigmas=grid.sigmas,
            nominal_sigmas=grid.sigmas,
            takeover=grid.takeover,
            site=cache.site,
            reuse=cache.reuse,
            corrector_at_reused=cache.corrector_at_reused,
            report={"policy": "uniform"},
        )
        return Arm(plan, call_kwargs(cfg))
    if cache.adjust_time and not hasattr(pipe.scheduler, "sigmas"):
        raise ErtaError(f"{type(pipe.scheduler).__name__} has no sigmas to move: add cache.adjust_time=false")
    plan = planned(cfg, get_calibration())
    if plan.rectification is not None and cache.rectifier_fit == "closed":
        plan = closed_loop_plan(cfg, pipe, plan)
    return Arm(plan, call_kwargs(cfg), get_calibration())


def planned(cfg: DictConfig, calibration: erta.Calibration) -> erta.Plan:
    """The plan of `cfg.cache` from a calibration."""
    cache = cfg.cache
    chosen: dict[str, Any] = budget(cfg)
    return calibration.plan(
        **chosen,
        **{key: cache[key] for key in PLAN_KEYS},
    )
