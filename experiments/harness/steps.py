"""What is known of a run step by step, as columns."""

from __future__ import annotations

from typing import Any

import numpy as np

import erta
from experiments.harness.arm import Arm


def step_table(mask: list[int], sigmas: list[float], arm: Arm, **by_step: Any) -> tuple[list[str], list[list[Any]]]:
    """Headings and a line a step: whether it is computed, the grid, and what the arm's calibration and plan know of it.

    Args:
        sigmas: one longer than the steps.
        by_step: further columns, a value a step each.
    """
    columns: dict[str, Any] = {"computed": mask, "sigma": sigmas[:-1], "next_sigma": sigmas[1:]}
    if arm.calibration is not None:
        columns["relative_change"] = profile(arm.calibration)[0]
    columns |= {"phi": arm.about.get("phi"), **by_step}
    known = {name: values for name, values in columns.items() if values is not None and len(values) == len(mask)}
    return ["step", *known], [[step, *line] for step, line in enumerate(zip(*known.values(), strict=True))]


def profile(calibration: erta.Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Relative L1 change from step i - 1 to i: mean and deviation over prompts and branches, each (num_steps,)."""
    spread = calibration.statistics.rel_l1
    mean = np.where(spread.count[0, :, 0] > 0, spread.mean[0, :, 0], np.nan)
    return mean, spread.std()[0, :, 0]
