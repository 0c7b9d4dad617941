"""Windows in shares of the steps."""

from __future__ import annotations

import pytest

import erta
from experiments.harness.setup import Setup
from experiments.methods.common import diffusers_caches
from tests.commands import config
from tests.pipelines import CALL, build_pipe, run


@pytest.mark.parametrize("window", [[0.15, 0.9], [0, 1], [0.32, 1.0]])
def test_a_window_is_of_steps(window):
    """8 steps on Wan's shifted grid. Mutants: shares of the timesteps, the steps' bounds in- or exclusive the other way."""
    pipe = build_pipe()
    shape = [f"model.{key}={value}" for key, value in CALL.items()]
    cfg = config("cache=pab", f"cache.options.window={window}", *shape)
    low, high = diffusers_caches.timesteps_between(Setup(cfg, pipe))
    run(pipe)
    inside = [low < int(time) < high for time in pipe.scheduler.timesteps]
    assert inside == [step > 0 and 8 * window[0] <= step < 8 * window[1] for step in range(8)]


@pytest.mark.parametrize("window", ["[0.9,0.1]", "[0.5]", "0.5", "[0,2]", "[a,b]"])
def test_a_window_that_is_none(window):
    shape = [f"model.{key}={value}" for key, value in CALL.items()]
    with pytest.raises(erta.ErtaError, match="must be two shares of the steps"):
        setup = Setup(config("cache=pab", f"cache.options.window={window}", *shape), build_pipe())
        diffusers_caches.timesteps_between(setup)
