"""An arm is one side of a comparison: what a method puts on the pipeline, and the arguments of the pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hydra.utils import get_method

import erta
from erta.solver import Solver
from erta.trace import CallTrace
from experiments.harness.generate import Sample, generate
from experiments.harness.kept import search_seconds
from experiments.harness.setup import Setup
from experiments.models.call import call_grid
from experiments.prompts.choose import Prompt


@dataclass(frozen=True)
class Arm:
    """The side of a comparison that a method makes; `Arm(None, setup.kwargs)` is the uncached side.

    Attributes:
        plan: a planned cache; None: the plain pipeline, or what `attach` brings.
        attach: for methods without a plan: a context manager on the pipeline that yields the trace of its last
            call, or None where it puts on no cache (another solver).
        report: how the arm was set up, for the record; a plan brings its own.
        searched_s: seconds that searches and measurements of the method's own took, also if an earlier run made them.
        reuse_share: what part of a forward a plan's reused steps run all the same (see `Setup.reuse_share`).
        changes_solver: `attach` puts on another solver, so the grid is another one.
        solver: the linear solver that `attach` amounts to, if it is one; a plan is collapsed where it is asked for.
    """

    plan: erta.Plan | None
    kwargs: dict[str, Any]
    calibration: erta.Calibration | None = None
    attach: Callable[[Any], AbstractContextManager[CallTrace | None]] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    searched_s: float = 0.0
    reuse_share: float = 0.0
    changes_solver: bool = False
    solver: Solver | None = None

    @property
    def calibration_s(self) -> float:
        """Seconds spent on calibration prompts before the first clip: calibration and searches."""
        return self.searched_s + (self.calibration.record["seconds"] if self.calibration is not None else 0.0)

    @property
    def num_computed(self) -> int:
        return self.plan.num_computed if self.plan is not None else self.num_steps

    @property
    def num_steps(self) -> int:
        """Steps of the solver."""
        return self.kwargs["num_inference_steps"]

    @property
    def about(self) -> dict[str, Any]:
        """How the arm was set up, for a record: the plan's report, or the method's own."""
        return self.plan.report if self.plan is not None else self.report

    def sample(self, pipe: Any, prompt: Prompt) -> Sample:
        """One sample from the prompt's noise."""
        return generate(pipe, prompt.text, prompt.seed, self.kwargs, self.put_on)

    @contextmanager
    def put_on(self, pipe: Any) -> Iterator[CallTrace | None]:
        """This arm on the pipeline, inside a `with`."""
        if self.plan is not None:
            with erta.cached(pipe, self.plan) as trace:
                trace.reuse_share = self.reuse_share
                yield trace
        else:
            with self.attach(pipe) if self.attach is not None else nullcontext() as own:
                yield own

    def sigmas(self, setup: Setup) -> np.ndarray:
        """The grid that is integrated, float32 (num_steps + 1,). The pipeline is asked where it is not the uncached run's."""
        if self.plan is not None:
            return self.plan.sigmas
        if self.kwargs == setup.kwargs and not self.changes_solver:
            return setup.grid.sigmas
        with self.put_on(setup.pipe):
            return call_grid(setup.pipe, self.kwargs).sigmas


def make_arm(setup: Setup) -> Arm:
    """The arm of `cfg.cache._target_`, with what it took to set it up."""
    with search_seconds() as spent:
        arm: Arm = get_method(setup.cfg.cache._target_)(setup)
    arm = replace(arm, searched_s=arm.searched_s + sum(spent.values()))
    if arm.plan is None or all(arm.plan.mask):
        return arm
    return replace(arm, reuse_share=setup.reuse_share(int(arm.plan.takeover == 0)))
