"""What `cache=...` can be: each function turns a config into the plan and the number of steps of the cached arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hydra.utils import get_method
from omegaconf import DictConfig

import erta
from erta.policy import steps_for_speedup
from erta.trace import CallTrace
from experiments.harness.config import CONF, DEFAULT_SPEEDUP, budget
from experiments.harness.kept import search_seconds
from experiments.models.call import call_sigmas
from experiments.models.costs import reuse_share

CACHES = CONF / "cache"


GetCalibration = Callable[[], erta.Calibration]


@dataclass(frozen=True)
class Arm:
    """The cached side of a comparison: what is put on the pipeline, and the pipeline's arguments.

    Attributes:
        plan: a planned cache; None: the plain pipeline, or what `attach` brings.
        attach: for methods without a plan: a context manager on the pipeline that yields the trace of its last
            call, or None where it puts on no cache (another solver).
        report: how the arm was set up, for the record; a plan brings its own.
        searched_s: seconds that searches and measurements of the method's own took, also if an earlier run made them.
        reuse_share: what part of a forward a plan's reused steps run all the same (see `counting.reuse_share`).
    """

    plan: erta.Plan | None
    kwargs: dict[str, Any]
    calibration: erta.Calibration | None = None
    attach: Callable[[Any], AbstractContextManager[CallTrace | None]] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    searched_s: float = 0.0
    reuse_share: float = 0.0

    @property
    def calibration_s(self) -> float:
        """Seconds spent on calibration prompts before the first clip: calibration and searches."""
        return self.searched_s + (self.calibration.record["seconds"] if self.calibration is not None else 0.0)

    @property
    def num_computed(self) -> int:
        return self.plan.num_computed if self.plan is not None else self.kwargs["num_inference_steps"]

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

    def sigmas(self, pipe: Any) -> np.ndarray:
        """The grid that is integrated, float32 (num_steps + 1,)."""
        if self.plan is not None:
            return self.plan.sigmas
        with self.put_on(pipe):
            return call_sigmas(pipe, self.kwargs)


def make_arm(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """The arm of `cfg.cache._target_`, with what it took to set it up."""
    with search_seconds() as spent:
        arm: Arm = get_method(cfg.cache._target_)(cfg, pipe, get_calibration)
    arm = replace(arm, searched_s=arm.searched_s + sum(spent.values()))
    if arm.plan is None or all(arm.plan.mask):
        return arm
    runs_first = int(arm.plan.takeover == 0)
    return replace(arm, reuse_share=reuse_share(arm.plan.site, pipe, arm.kwargs, runs_first))


def step_count(cfg: DictConfig, takeover: int | None = None) -> int:
    """The budget in computed steps. Raises BudgetError for a threshold.

    With two transformers, the second runs from step `takeover`, which is computed anyhow.
    """
    chosen = budget(cfg)
    if cfg.cache.threshold is None and "threshold" in chosen:  # the model's published one: not for this method
        chosen = {"speedup": DEFAULT_SPEEDUP}
    if "threshold" in chosen:
        raise erta.BudgetError(f"cache={cfg.cache.name} has no threshold: give cache.speedup or cache.steps")
    if "steps" in chosen:
        return int(chosen["steps"])
    return steps_for_speedup(cfg.model.num_inference_steps, chosen["speedup"], takeover)
