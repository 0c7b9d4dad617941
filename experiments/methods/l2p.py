"""L2P (2026, arXiv 2604.26365): a reused step takes a learned linear combination of all earlier computed outputs.

Site: none, the scheduler's place; the combination is of guided outputs. Stored: the outputs of all computed steps. Static:
every n-th step is computed; at each step between, the output is fitted by all computed ones before it, along uncached
trajectories (open loop), and the pipeline's own solver goes on with it. Where we differ: least squares in place of gradient
descent, which find the same minimum; outputs in place of the features before the last layer; the budget's evenly spread steps
where it is no fixed interval.
"""

from __future__ import annotations

import numpy as np
import torch

from erta.fitted_scheduler import FittedScheduler
from erta.policy import Mask, uniform_mask
from erta.scheduler import with_grid
from erta.solver import Computed, Predict, linear_solver
from erta.trajectories import Trajectories
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.solvers import get_trajectories, solver_arm


def arm(setup: Setup) -> Arm:
    """L2P on evenly spread steps."""
    ridge = check_number("ridge", setup.options["ridge"], 0)
    trajectories = get_trajectories(setup)
    mask = uniform_mask(trajectories.num_steps, setup.step_count(setup.grid.takeover), setup.grid.takeover)
    weights = combinations(trajectories, mask, ridge)
    scheduler = with_grid(setup.pipe.scheduler, trajectories.sigmas)
    solver = linear_solver(scheduler, mask, predict=combination_of(weights), report={"ridge": ridge})
    return solver_arm(setup, FittedScheduler(solver, setup.pipe.scheduler))


def combinations(trajectories: Trajectories, mask: Mask, ridge: float) -> dict[int, np.ndarray]:
    """For each reused step, the weights of the computed outputs before it, oldest first."""
    outputs, found = trajectories.outputs.astype(np.float64), {}
    for step, computed in enumerate(mask):
        if computed:
            continue
        earlier = outputs[:, [source for source in range(step) if mask[source]]]
        products = np.einsum("pam,pbm->ab", earlier, earlier)
        wanted = np.einsum("pam,pm->a", earlier, outputs[:, step])
        found[step] = np.linalg.solve(products + np.diag(ridge * np.diag(products)), wanted)
    return found


def combination_of(weights: dict[int, np.ndarray]) -> Predict:
    """The prediction with these weights, for `linear_solver`."""

    def predict(step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
        return sum(float(weight) * seen.v for weight, seen in zip(weights[step], computed, strict=True))  # type: ignore[return-value]

    return predict
