"""What `cache=...` can be: each function turns a config into the plan and the number of steps of the cached arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

import erta
from erta.errors import ErtaError, choice_index
from erta.schedule import steps_for_speedup, uniform_mask
from erta.trace import CallTrace
from experiments.calibrating import closed_loop_plan
from experiments.config import CONF, DEFAULT_SPEEDUP, budget
from experiments.models import call_grid, call_kwargs, call_sigmas, set_sampler
from experiments.peers.calibrated import search_seconds
from experiments.peers.counting import reuse_share

PLAN_KEYS = (
    "policy",
    "rel_l1_denominator",
    "adjust_time",
    "phi_denominator",
    "time_form",
    "rectify",
    "rectifier",
    "rectifier_form",
    "corrector_at_reused",
    "reuse",
)
CACHES, SAMPLERS = CONF / "cache", CONF / "sampler"
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


def no_cache(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """The uncached run a second time: the noise floor of every metric."""
    return Arm(None, call_kwargs(cfg))


def fewer_steps(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """The pipeline itself at as many steps as the budget has forwards: a baseline of ours, which few papers show.

    Site: none. Stored: nothing. Static. Where we differ: nowhere, it is what a user does without a cache.
    `cache.options.sampler` names another solver (of the group `sampler`) for this side alone: the uncached run that
    it is compared with keeps `sampler=`.
    """
    kwargs = {**call_kwargs(cfg), "num_inference_steps": step_count(cfg)}
    name = cfg.cache.options.get("sampler")
    if name is None:
        return Arm(None, kwargs)
    choice_index("cache.options.sampler", name, tuple(sorted(path.stem for path in SAMPLERS.glob("*.yaml"))))
    other = OmegaConf.create({"model": cfg.model, "sampler": OmegaConf.load(SAMPLERS / f"{name}.yaml")})
    swapped = SimpleNamespace(scheduler=pipe.scheduler)
    set_sampler(swapped, other)

    @contextmanager
    def attach(pipe: Any) -> Iterator[None]:
        own, pipe.scheduler = pipe.scheduler, swapped.scheduler
        try:
            yield
        finally:
            pipe.scheduler = own

    return Arm(None, kwargs, attach=attach, report={"sampler": name})


def reuse(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """ERTACache (Peng et al., 2025, arXiv 2508.21091), whole or in parts, and uniform reuse, its ablation's first row.

    Site: `cache.site`, by default the output. Stored: the last residual, one in each guidance branch, where a later step
    reuses it. Static: the steps are planned from a calibration; evenly spread ones without adjustment and rectification
    need none. Where we differ: see `erta.plan` and the options of `cache`; sources disagree on several formulas.
    """
    cache = cfg.cache
    if cache.policy == "uniform" and not cache.adjust_time and not cache.rectify:
        grid = call_grid(pipe, call_kwargs(cfg))
        plan = erta.Plan(
            mask=uniform_mask(cfg.model.num_inference_steps, step_count(cfg, grid.takeover), grid.takeover),
            sigmas=grid.sigmas,
            nominal_sigmas=grid.sigmas,
            takeover=grid.takeover,
            site=cache.site,
            reuse=cache.reuse,
            corrector_at_reused=cache.corrector_at_reused,
            report={"policy": "uniform"},
        )
        return Arm(plan, call_kwargs(cfg))
    if cache.adjust_time and not hasattr(pipe.scheduler, "sigmas"):
        raise ErtaError(f"{type(pipe.scheduler).__name__} has no sigmas to move: add cache.adjust_time=false")
    plan = planned(cfg, get_calibration())
    if plan.rectification is not None and cache.rectifier_fit == "closed":
        plan = closed_loop_plan(cfg, pipe, plan)
    return Arm(plan, call_kwargs(cfg), get_calibration())


def planned(cfg: DictConfig, calibration: erta.Calibration) -> erta.Plan:
    """The plan of `cfg.cache` from a calibration."""
    cache = cfg.cache
    chosen: dict[str, Any] = budget(cfg)
    return calibration.plan(
        **chosen,
        **{key: cache[key] for key in PLAN_KEYS},
    )


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


def profile(calibration: erta.Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Relative L1 change from step i - 1 to i: mean and deviation over prompts and branches, each (num_steps,)."""
    spread = calibration.statistics.rel_l1
    mean = np.where(spread.count[0, :, 0] > 0, spread.mean[0, :, 0], np.nan)
    return mean, spread.std()[0, :, 0]
