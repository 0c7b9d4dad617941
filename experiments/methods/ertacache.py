"""ERTACache, whole or in parts, and uniform reuse."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import erta
from erta.errors import ErtaError
from erta.policy import uniform_mask
from experiments.harness.arm import Arm
from experiments.harness.calibrations import closed_loop_plan, get_calibration
from experiments.harness.config import budget
from experiments.harness.setup import Setup


def arm(setup: Setup) -> Arm:
    """ERTACache (Peng et al., 2025, arXiv 2508.21091), whole or in parts, and uniform reuse, its ablation's first row.

    Site: `cache.site`, by default the output. Stored: the last residual, one in each guidance branch, where a later step
    reuses it. Static: the steps are planned from a calibration; evenly spread ones without adjustment and rectification
    need none. Where we differ: see `erta.PlanOptions`; sources disagree on several formulas.
    """
    cache, solver = setup.cfg.cache, type(setup.pipe.scheduler).__name__
    if not cache.corrector_at_reused and not hasattr(setup.pipe.scheduler, "disable_corrector"):
        raise ErtaError(
            f"{solver} has no corrector to switch off at reused steps: leave cache.corrector_at_reused=true"
        )
    if cache.policy == "uniform" and not cache.adjust_time and not cache.rectify:
        return Arm(uniform_plan(setup), setup.kwargs)
    if cache.adjust_time and not hasattr(setup.pipe.scheduler, "sigmas"):
        raise ErtaError(f"{solver} has no sigmas to move: add cache.adjust_time=false")
    options = erta.PlanOptions(**{option.name: cache[option.name] for option in fields(erta.PlanOptions)})
    calibration = get_calibration(setup)
    asked: dict[str, Any] = budget(setup.cfg)
    plan = calibration.plan(**asked, options=options)
    if plan.rectification is not None and cache.rectifier_fit == "closed":
        plan = closed_loop_plan(setup, plan)
    return Arm(plan, setup.kwargs, calibration)


def uniform_plan(setup: Setup) -> erta.Plan:
    """Evenly spread steps on the nominal grid, which need no calibration."""
    cache, grid = setup.cfg.cache, setup.grid
    return erta.Plan(
        mask=uniform_mask(setup.cfg.model.num_inference_steps, setup.step_count(grid.takeover), grid.takeover),
        sigmas=grid.sigmas,
        nominal_sigmas=grid.sigmas,
        takeover=grid.takeover,
        site=cache.site,
        reuse=cache.reuse,
        corrector_at_reused=cache.corrector_at_reused,
        report={"policy": "uniform"},
    )
