"""L2P (2026, arXiv 2604.26365): a reused step takes a learned linear combination of all earlier computed outputs.

Site: none, the scheduler's place; the combination is of guided outputs. Stored: the outputs of all computed steps. Static:
every n-th step is computed; at each step between, the output is fitted by all computed ones before it, along uncached
trajectories (open loop), and the pipeline's own solver goes on with it. Its ridge is cross-validated over prompts. Where we differ: least squares in place of gradient
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

RIDGES = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # that cross-validation chooses from


def arm(setup: Setup) -> Arm:
    """L2P on evenly spread steps."""
    asked = setup.options["ridge"]
    given = None if asked is None else check_number("ridge", asked, 0)
    trajectories = get_trajectories(setup)
    mask = uniform_mask(trajectories.num_steps, setup.step_count(setup.grid.takeover), setup.grid.takeover)
    ridge = cross_validated_ridge(trajectories, mask) if given is None else given
    weights = combinations(trajectories, mask, ridge)
    scheduler = with_grid(setup.pipe.scheduler, trajectories.sigmas)
    solver = linear_solver(scheduler, mask, predict=combination_of(weights), report={"ridge": ridge})
    return solver_arm(setup, FittedScheduler(solver, setup.pipe.scheduler))


def combinations(trajectories: Trajectories, mask: Mask, ridge: float) -> dict[int, np.ndarray]:
    """For each reused step, the weights of the computed outputs before it, oldest first."""
    products = products_by_prompt(trajectories.outputs).sum(axis=0)
    return {step: _solved(products, step, mask, ridge) for step, computed in enumerate(mask) if not computed}


def cross_validated_ridge(trajectories: Trajectories, mask: Mask) -> float:
    """Of `RIDGES`, the one with the smallest error on prompts that the weights were not fitted to, each left out in turn.

    The error is the squared relative error of the reused steps' outputs, in sum. The middle one for a single prompt, which leaves
    nothing to fit to.
    """
    products, reused = products_by_prompt(trajectories.outputs), [step for step, on in enumerate(mask) if not on]
    if len(products) < 2 or not reused:
        return RIDGES[len(RIDGES) // 2]
    total = products.sum(axis=0)

    def error(ridge: float) -> float:
        found = 0.0
        for one in products:
            for step in reused:
                left = np.append(-_solved(total - one, step, mask, ridge), 1.0)
                rows = [*_sources(step, mask), step]
                found += left @ one[np.ix_(rows, rows)] @ left / max(one[step, step], np.finfo(float).tiny)
        return found

    return min(RIDGES, key=error)


def products_by_prompt(outputs: np.ndarray) -> np.ndarray:
    """Inner products of all outputs (P, N, M), float64 (P, N, N)."""
    values = outputs.astype(np.float64)
    return values @ values.transpose(0, 2, 1)


def _sources(step: int, mask: Mask) -> list[int]:
    return [source for source in range(step) if mask[source]]


def _solved(products: np.ndarray, step: int, mask: Mask, ridge: float) -> np.ndarray:
    """Weights of the computed outputs before a step, from the products of all, (N, N)."""
    sources = _sources(step, mask)
    small = products[np.ix_(sources, sources)]
    return np.linalg.solve(small + np.diag(ridge * np.diag(small)), products[sources, step])


def combination_of(weights: dict[int, np.ndarray]) -> Predict:
    """The prediction with these weights, for `linear_solver`."""

    def predict(step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
        return sum(float(weight) * seen.v for weight, seen in zip(weights[step], computed, strict=True))  # type: ignore[return-value]

    return predict
