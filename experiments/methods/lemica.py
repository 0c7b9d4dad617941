"""LeMiCa (Gao et al., 2025, arXiv 2511.00090): what caching one stretch of steps does to the final output, minimax.

Site: as `cache.site` says; the output by default. Stored: the last residual in each guidance branch. Static: the edge i
→ j costs the L1 distance of the final latents to the uncached ones when steps i + 1 … j - 1 alone are reused, measured
by a run for each stretch on a calibration prompt. The path with exactly `cache.steps` edges is taken whose worst edge
is smallest, then the second worst, and so on. Where we differ: one prompt, and stretches of at most `max_skip` reused
steps, since each costs a run (once: they are kept); so no fewer than N / (max_skip + 1) steps can be planned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.paths import best_path
from experiments.methods.common.searched import planned_arm, trial_runs
from experiments.output.console import progress_bar


def arm(setup: Setup) -> Arm:
    """LeMiCa's schedule for the budget."""
    max_skip, count = check_number("max_skip", setup.options["max_skip"], 1, whole=True), setup.step_count()

    def measure() -> dict[str, Any]:
        return {"edges": stretch_costs(setup, max_skip)}

    edges = kept(setup, "lemica", [max_skip, setup.cfg.cache.reuse], measure)["edges"]
    mask = best_path(cost_matrix(edges, setup.cfg.model.num_inference_steps), count, minimax=True)
    return planned_arm(setup, mask, {"max_skip": max_skip, "edges": edges})


def cost_matrix(edges: list[list[float]], num_steps: int) -> np.ndarray:
    """(N, N + 1) from the list of (i, j, cost): 0 between neighbours, infinite where nothing was measured."""
    cost = np.full((num_steps, num_steps + 1), np.inf)
    cost[np.arange(num_steps), np.arange(num_steps) + 1] = 0
    for i, j, value in edges:
        cost[int(i), int(j)] = value
    return cost


def stretch_costs(setup: Setup, max_skip: int) -> list[list[float]]:
    """(i, j, mean |difference of the final latents|) with steps i + 1 … j - 1 reused, all others computed."""
    steps, run, edges = setup.cfg.model.num_inference_steps, trial_runs(setup), []
    reference = run(None)
    stretches = [(i, j) for i in range(steps) for j in range(i + 2, min(i + max_skip + 1, steps) + 1)]
    with progress_bar() as bar:
        for i, j in bar.track(stretches, description="lemica: one run for each stretch"):
            made = run(tuple(not i < step < j for step in range(steps)))
            edges.append([i, j, (made - reference).abs().mean().item()])
    return edges
