"""ERTAPlan (this project): a cache is a solver, so its nodes are planned and its coefficients are fitted.

Site: none, the scheduler's place. Stored: latents and guided outputs of the last two computed steps (`branches: apart`: how the
guidance branches differ there too, noted by a hook on the transformer). Static: the nodes are a
shortest path over local errors read off recorded trajectories; the coefficients, six numbers a step, are closed-form least
squares along the solver's own run on calibration prompts (`erta.fit`). No paper: it is a method of ours. Where we differ: from
caches, in that nothing is reused and the transformer holds nothing; from fitted solvers before it (IIA, 2304.11328;
DPM-Solver-v3, 2310.13268; L2P, 2604.26365), in that nodes and coefficients are fitted in closed form, closed loop, to the full
run.
"""

from __future__ import annotations

import warnings

import erta
from erta.errors import ErtaError
from erta.nodes import Nodes, climbed, placed_nodes
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.solvers import (
    get_trajectories,
    kept_solver,
    kept_trajectories,
    solver_arm,
    step_bar,
)
from experiments.output import console
from experiments.prompts.choose import test_prompts


def arm(setup: Setup) -> Arm:
    """The fitted solver for the budget. Raises ErtaError for `site=blocks`: a solver works on what the scheduler sees."""
    return solver_arm(setup, fitted(setup, "ertaplan", get_trajectories(setup)))


def oracle(setup: Setup) -> Arm:
    """Nodes and coefficients fitted on the test samples themselves: no method, but what there is left to gain."""
    return solver_arm(setup, fitted(setup, "ertaplan-oracle", _test_samples(setup)))


def oracle_nodes(setup: Setup) -> Arm:
    """Nodes searched on the test samples too, by runs that are fitted to them: what a better choice of nodes could gain."""
    options = dict(setup.options)
    trials = check_number("trials", options.pop("trials"), 1, whole=True)
    seen, count = _test_samples(setup), step_count_at_output(setup)

    def at(nodes: Nodes) -> erta.FittedScheduler:
        with step_bar(f"fit {count} steps to the test samples") as advance:
            return erta.fit(setup.pipe, seen, nodes=nodes, options=erta.FitOptions(**options), on_step=advance)

    def search() -> erta.FittedScheduler:
        begins = placed_nodes(seen, count, options["placement"], options["over_prompts"])

        def score(nodes: Nodes) -> float:
            return at(nodes).report["on_calibration"]["mean_psnr_db"]

        return at(climbed(max(begins.values(), key=score), seen.num_steps, score, trials, seen.signature["takeover"]))

    key = [setup.options, count, seen.record["prompts"], seen.record["seeds"]]
    return solver_arm(setup, kept_solver(setup, "ertaplan-oracle-nodes", key, search))


def fitted(setup: Setup, name: str, trajectories: erta.Trajectories) -> erta.FittedScheduler:
    """The solver of this configuration, found or made."""
    options, count = erta.FitOptions(**setup.options), step_count_at_output(setup)

    def make() -> erta.FittedScheduler:
        with step_bar(f"fit {count} steps") as advance, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*plain ERTACache")  # said below, also of what is kept
            return erta.fit(setup.pipe, trajectories, steps=count, options=options, on_step=advance)

    seen = [trajectories.record["prompts"], trajectories.record["seeds"]]
    found = kept_solver(setup, name, [setup.options, count, seen], make)
    if said := found.report.get("warning"):
        console.note(said)
    return found


def step_count_at_output(setup: Setup) -> int:
    """The budget. Raises ErtaError for `site=blocks`."""
    if setup.cfg.cache.site != "output":
        raise ErtaError(f"cache={setup.cfg.cache.name} works in the scheduler's place: use cache.site=output")
    return setup.step_count()


def _test_samples(setup: Setup) -> erta.Trajectories:
    prompts = test_prompts(setup.cfg)
    return kept_trajectories(setup, "test-trajectories", [one.text for one in prompts], [one.seed for one in prompts])
