"""ERTAPlan (this project): a cache is a solver, so its nodes are planned and its coefficients are fitted.

Site: none, the scheduler's place. Stored: latents and guided outputs of the last two computed steps. Static: the nodes are a
shortest path over local errors read off recorded trajectories; the coefficients, six numbers a step, are closed-form least
squares along the solver's own run on calibration prompts (`erta.fit`). No paper: it is a method of ours. Where we differ: from
caches, in that nothing is reused and the transformer holds nothing; from fitted solvers before it (IIA, 2304.11328;
DPM-Solver-v3, 2310.13268; L2P, 2604.26365), in that nodes and coefficients are fitted in closed form, closed loop, to the full
run.
"""

from __future__ import annotations

import erta
from erta.errors import ErtaError
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.solvers import (
    get_trajectories,
    kept_solver,
    kept_trajectories,
    solver_arm,
    step_bar,
)
from experiments.prompts.choose import test_prompts


def arm(setup: Setup) -> Arm:
    """The fitted solver for the budget. Raises ErtaError for `site=blocks`: a solver works on what the scheduler sees."""
    return solver_arm(setup, fitted(setup, "ertaplan", get_trajectories(setup)))


def oracle(setup: Setup) -> Arm:
    """Nodes and coefficients fitted on the test samples themselves: no method, but what there is left to gain."""
    prompts = test_prompts(setup.cfg)
    seen = kept_trajectories(setup, "test-trajectories", [one.text for one in prompts], [one.seed for one in prompts])
    return solver_arm(setup, fitted(setup, "ertaplan-oracle", seen))


def fitted(setup: Setup, name: str, trajectories: erta.Trajectories) -> erta.FittedScheduler:
    """The solver of this configuration, found or made."""
    if setup.cfg.cache.site != "output":
        raise ErtaError(f"cache={setup.cfg.cache.name} works in the scheduler's place: use cache.site=output")
    options, count = erta.FitOptions(**setup.options), setup.step_count()

    def make() -> erta.FittedScheduler:
        with step_bar(f"fit {count} steps") as advance:
            return erta.fit(setup.pipe, trajectories, steps=count, options=options, on_step=advance)

    seen = [trajectories.record["prompts"], trajectories.record["seeds"]]
    return kept_solver(setup, name, [setup.options, count, seen], make)
