"""What the caches that diffusers ships have in common: the arm, and windows in steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from erta.errors import ErtaError
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.counting import diffusers_cache
from experiments.methods.common.knob import Attach, Knob, check_number, knob_arm

TRUNCATED = 0.5  # of a timestep: some solvers keep whole ones, cut off


def shipped_arm(setup: Setup, knob: Knob, make_config: Callable[..., Any]) -> Arm:
    """A cache of diffusers; `make_config` is called with the YAML file's options, the knob among them."""
    options, costs = setup.options, setup.costs

    def attach_with(value: float) -> Attach:
        values = {**options, knob.name: check_number(knob.name, value, 0)}
        return lambda pipe: diffusers_cache(pipe, make_config(**values), costs)

    return knob_arm(setup, knob, attach_with)


def timesteps_between(setup: Setup) -> tuple[float, float]:
    """Timesteps, exclusive, between which the steps of `cache.options.window` lie on this pipeline's own grid.

    The window is two shares of the steps; step 0 has nothing to reuse. The papers give timesteps of evenly spaced grids; on
    a shifted one the same timesteps would hold other steps, on Wan hardly any. Raises ErtaError for a window that is none.
    """
    window = setup.options["window"]
    numbers = isinstance(window, list) and len(window) == 2 and all(isinstance(share, (int, float)) for share in window)
    if not numbers or not 0 <= window[0] < window[1] <= 1:
        raise ErtaError(f"cache.options.window must be two shares of the steps, as [0.15,0.9], not {window}")
    steps, sigmas = setup.cfg.model.num_inference_steps, setup.grid.sigmas
    first, end = max(1, math.ceil(window[0] * steps)), math.ceil(window[1] * steps)  # steps first … end - 1
    between = [float(a + b) / 2 for a, b in itertools.pairwise(sigmas[:-1])]
    edges = [float("inf"), *between, -1.0]  # edges[k] lies before step k
    scale = setup.pipe.scheduler.config.num_train_timesteps
    return scale * edges[end] - TRUNCATED, scale * edges[first] - TRUNCATED
