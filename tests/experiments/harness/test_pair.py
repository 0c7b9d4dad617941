"""What pairs of samples took: the share of the possible speed-up that was realised."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from experiments.harness.generate import generate
from experiments.harness.pair import Clock, _measure
from experiments.prompts.choose import Prompt
from tests.pipelines import CALL, build_pipe


def clock(cached_forward_s: float, uncached_rest_s: float) -> Clock:
    """4 steps, 2 of them computed; an uncached forward takes 1 s; the hook 0.2 s in all, the cached side's solver 0.4 s."""
    setup = SimpleNamespace(cfg=OmegaConf.create({"model": {"num_inference_steps": 4}}))
    uncached = {"denoise_s": 4.0 + uncached_rest_s, "pipeline_s": 6.0, "forward_s": 4.0, "forwards": 4}
    cached = {"denoise_s": 2 * cached_forward_s + 0.6, "pipeline_s": 4.0, "forward_s": 2 * cached_forward_s}
    cached |= {"forwards": 2, "overhead_s": 0.2, "overhead_calls": 4}
    return Clock(setup, SimpleNamespace(num_steps=4, calibration_s=0.0), [{"uncached": uncached, "cached": cached}])


@pytest.mark.parametrize(("forward_s", "rest_s", "needed_s"), [(1.0, 0.4, 2.4), (0.8, 0.4, 2.0), (1.0, 4.0, 2.4)])
def test_the_possible_speedup_bounds_the_measured_one(forward_s, rest_s, needed_s):
    """The same whether the machine was faster for the cached side or the uncached solver slower.

    Mutants: uncached forwards in place of the cached ones (1.09 at 0.8 s); the uncached solver's time whatever the cached
    one's (2.31 at 4 s); the hook left out (1).
    """
    found = clock(forward_s, rest_s).speedups()
    cached_s = 2 * forward_s + 0.6
    assert found["speedup_possible"] == pytest.approx((4 + rest_s) / needed_s)
    assert (
        found["speedup_denoise"] == pytest.approx((4 + rest_s) / cached_s)
        and found["speedup_denoise"] < found["speedup_possible"]
    )
    assert found["speedup_realised"] == pytest.approx(needed_s / cached_s)


def test_slower_steps_count():
    """The cached side's solver takes 0.4 s where the uncached one takes 0.1 s: 2.1 of 2.6 s were needed."""
    assert clock(1.0, 0.1).speedups()["speedup_realised"] == pytest.approx(2.1 / 2.6)


def test_the_hooks_time_in_the_record():
    """0.2 s over 4 calls: 50 ms a call, of one branch, 5 % of a forward of 1 s. Mutants: it doubled; a call of all prompts'."""
    timing = clock(0.8, 0.4).timing()
    assert timing.hook_overhead_per_step_s == pytest.approx(0.05)
    assert timing.hook_overhead_of_forward == pytest.approx(0.05)
    assert timing.forward_s == 1.0 and timing.solver_step_s == pytest.approx(0.1)


def test_a_sample_has_the_times_of_its_trace():
    """Mutants: the hook's time doubled on its way into the row; calls of one branch alone."""
    trace = SimpleNamespace(
        forward_s=3.0, forwards={"cond": 2, "uncond": 2}, overhead_s=0.25, cache_bytes=8, cache_dtype="f"
    )
    trace.executed = {"cond": [(0, True), (1, False)], "uncond": [(0, True), (1, False)]}
    sample = generate(
        build_pipe(), "a red circle", 0, {**CALL, "num_inference_steps": 2}, lambda pipe: nullcontext(trace)
    )
    assert (sample.overhead_s, sample.overhead_calls, sample.forward_s, sample.forwards) == (0.25, 4, 3.0, 4)
    assert sample.mask == (True, False) and 0 < sample.denoise_s <= sample.pipeline_s
    row = _measure(0, Prompt("a red circle", 0, id="x"), {"uncached": sample, "cached": sample}, {})
    assert {key: row["cached"][key] for key in ("overhead_s", "overhead_calls", "forward_s", "forwards")} == {
        "overhead_s": 0.25, "overhead_calls": 4, "forward_s": 3.0, "forwards": 4,
    }  # fmt: skip
