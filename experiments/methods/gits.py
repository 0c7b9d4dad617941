"""GITS (Chen et al., 2024, arXiv 2405.11326): where the steps lie, by dynamic programming on trajectories.

Site: none. Stored: nothing. Static: the edge i → j costs the distance of the latent that one Euler step from i reaches at j to
that of the uncached trajectory, mean over calibration prompts; the cheapest path with exactly `cache.steps` edges is the grid,
and the pipeline's own solver runs on it. Each edge counts `coefficient` times as much as the one before it, as published. Where
we differ: L2 distance at a sample of the latent's entries, and our calibration prompts in place of 256.
"""

from __future__ import annotations

import numpy as np

from erta.errors import BudgetError
from erta.policy import Mask
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.searched import grid_arm
from experiments.methods.common.solvers import get_trajectories


def arm(setup: Setup) -> Arm:
    """The pipeline's own solver on GITS's grid."""
    coefficient = check_number("coefficient", setup.options["coefficient"], 0)
    trajectories = get_trajectories(setup)
    costs = edge_costs(trajectories.latents, trajectories.outputs, trajectories.sigmas)
    return grid_arm(setup, weighted_path(costs, setup.step_count(), coefficient), {"coefficient": coefficient})


def edge_costs(latents: np.ndarray, outputs: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """(N, N + 1): mean over prompts of the L2 distance after one Euler step from i to j; infinite for j <= i.

    Latents (P, N + 1, M), outputs (P, N, M).
    """
    steps = outputs.shape[1]
    costs = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        for j in range(i + 1, steps + 1):
            reached = latents[:, i] + (sigmas[j] - sigmas[i]) * outputs[:, i]
            costs[i, j] = np.linalg.norm(reached - latents[:, j], axis=1).mean()
    return costs


def weighted_path(costs: np.ndarray, count: int, coefficient: float) -> Mask:
    """The path of `count` edges with the smallest `V(i, k) = min_j costs[i, j] + coefficient V(j, k - 1)`.

    Raises BudgetError if there is none.
    """
    steps = len(costs)
    if not 1 <= count <= steps:
        raise BudgetError(f"a grid of {count} of {steps} steps cannot be")
    value = np.full(steps + 1, np.inf)
    value[steps] = 0.0
    choices = []
    for _ in range(count):
        through = costs + coefficient * value[None, :]
        choices.append(through.argmin(axis=1))
        value = np.append(through.min(axis=1), np.inf)
    nodes = [0]
    for choice in reversed(choices[1:]):
        nodes.append(int(choice[nodes[-1]]))
    return tuple(step in nodes for step in range(steps))
