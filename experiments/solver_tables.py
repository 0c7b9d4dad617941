"""`experiment=solver_tables`: what each static method really does, as the solver that it amounts to.

A static method at the output is a linear multistep rule on the steps that it computes (`erta.collapse`). Here the rules of
several methods at one budget stand side by side: where their nodes lie, how much of the outputs of the last nodes each step
takes, as a share of the step's length in sigma, and how much of earlier latents.

No claim of the paper is under test. `series.solvers`: by title, nodes, sigmas, and coefficients (K, H), means over channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from erta.solver import Solver
from experiments.harness import catalogue
from experiments.harness.arm import make_arm
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.rows import Row, compose_row
from experiments.harness.setup import Setup
from experiments.methods.common.solvers import solver_of
from experiments.output import console


def run(cfg: DictConfig, folder: Path) -> None:
    """Set up every method; write the tables, the figure and `record.json`. Raises ErtaError for a method that is no solver."""
    setup, solvers = Setup(cfg), {}
    for name in cfg.solver_tables.methods:
        own = setup.with_cache(compose_row(Row(name, name, computed=setup.step_count())))
        solvers[catalogue.facts(name).title] = solver_of(own, make_arm(own))
    console.table(
        f"{cfg.model.name}: methods as linear solvers",
        ["method", "nodes", "memory", "latents kept"],
        [[title, f"{one.num_steps}", f"{one.memory}", f"{one.kept}"] for title, one in solvers.items()],
    )
    finish_figure(cfg, folder, [], {"solvers": {title: as_data(one) for title, one in solvers.items()}}, [])


def as_data(solver: Solver) -> dict[str, Any]:
    """A solver's tables for a record."""
    return {
        "nodes": list(solver.nodes),
        "sigmas": rounded(solver.sigmas.tolist()),
        "velocity": rounded(solver.velocity.mean(axis=2).tolist()),
        "latent": rounded(solver.latent.mean(axis=2).tolist()),
        "memory": solver.memory,
        "kept": solver.kept,
    }
