"""Adams-Bashforth on ERTAPlan's nodes: what a textbook formula makes of them; a baseline of ours, which no paper shows.

Site: none, the scheduler's place. Stored: the outputs of the last computed steps. Static: the outputs of the last `order`
nodes are interpolated by a polynomial in sigma, which is integrated over the step (Adams and Bashforth, 1883, for uneven steps).
Where we differ: from ERTAPlan, by the coefficients alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from erta.fitted_scheduler import FittedScheduler
from erta.scheduler import with_grid
from erta.solver import linear_solver
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.searched import arm_of
from experiments.methods.common.solvers import solver_arm


def arm(setup: Setup) -> Arm:
    """Adams-Bashforth of `cache.options.order` on the nodes that ERTAPlan has for the budget."""
    order = check_number("order", setup.options["order"], 1, whole=True)
    planned = arm_of(setup, "ertaplan")
    mask = tuple(map(bool, planned.report["mask"]))
    frame = linear_solver(with_grid(setup.pipe.scheduler, setup.grid.sigmas), mask)
    velocity = weights(frame.sigmas, order)[:, :, None]
    solver = replace(
        frame,
        velocity=velocity,
        latent=np.zeros_like(velocity),
        offset=np.zeros((len(velocity), 1)),
        report={"order": order},
    )
    return replace(solver_arm(setup, FittedScheduler(solver, setup.pipe.scheduler)), searched_s=planned.searched_s)


def weights(sigmas: np.ndarray, order: int) -> np.ndarray:
    """Weights of the last outputs, newest first, (K, order), for the grid (K + 1,); fewer at the first steps."""
    grid = np.asarray(sigmas, np.float64)
    found = np.zeros((len(grid) - 1, order))
    for k in range(len(grid) - 1):
        at = grid[max(0, k - order + 1) : k + 1][::-1]
        powers = np.arange(len(at))
        moments = (grid[k + 1] ** (powers + 1) - grid[k] ** (powers + 1)) / (powers + 1)
        found[k, : len(at)] = np.linalg.solve(np.vander(at, increasing=True).T, moments)
    return found
