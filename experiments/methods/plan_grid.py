"""What a static method's choice of steps is worth without its cache: a baseline of ours, which no paper shows.

Site: none. Stored: nothing. Static: the same solver runs on nothing but the sigmas of the steps that the method computes, as
many forwards, no reuse. Where this does as well as the method, the method has found a grid, and caching adds nothing. Where
we differ: from the method, by its cache alone.
"""

from __future__ import annotations

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from erta.errors import ErtaError
from experiments.harness.arm import CACHES, Arm, GetCalibration, make_arm
from experiments.harness.config import BUDGETS, CacheConfig
from experiments.methods.common.knob import options_of
from experiments.methods.common.searched import plan_of
from experiments.models.call import call_kwargs

WHOLE_STEPS = ("policy", "policy_time", "ertacache", "uniform", "lemica", "gcache", "budcache", "meancache")


def arm(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """The grid of the method that `cache.options.of` names, at the same budget and site.

    Raises ErtaError for a method that chooses no whole steps beforehand.
    """
    name = options_of(cfg)["of"]
    path = CACHES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in CACHES.glob("*.yaml")))
        raise ErtaError(f"cache.options.of={name}: there is no such method. Choose from {known}")
    same = {key: cfg.cache[key] for key in (*BUDGETS, "site", "reuse")}
    other = OmegaConf.merge(OmegaConf.structured(CacheConfig), OmegaConf.load(path), same)
    planning = copy.deepcopy(cfg)
    planning.cache = other
    made = make_arm(planning, pipe, get_calibration)
    plan = made.plan
    if plan is None and "mask" in made.report:
        plan = plan_of(cfg, pipe, tuple(map(bool, made.report["mask"])), {})
    if plan is None:
        raise ErtaError(
            f"cache.options.of={name}: {name} does not choose beforehand which steps are computed whole: it decides while "
            "it runs, differently in each guidance branch, or leaves out parts of a forward, so that its whole steps "
            f"alone would not be its budget. Those that do: {', '.join(WHOLE_STEPS)}"
        )
    grid = plan.grid_only()
    return Arm(
        grid, {**call_kwargs(cfg), "num_inference_steps": grid.num_steps}, made.calibration, searched_s=made.searched_s
    )
