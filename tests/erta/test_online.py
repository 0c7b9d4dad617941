"""Rules that decide while they run: the hook, the trace, the way on and off."""

from __future__ import annotations

import pytest
import torch

import erta
from erta.online import Call, OnlineRule, online
from tests.pipelines import STEPS, build_pipe, run


class Scripted(OnlineRule):
    """Computes where a list says so, and remembers what it was shown."""

    def __init__(self, *computed: int) -> None:
        self.steps, self.begun, self.asked, self.shown = computed, [], [], []

    def begin(self, num_steps: int) -> None:
        self.begun.append(num_steps)
        self.asked, self.shown = [], []

    def should_compute(self, call: Call) -> bool:
        self.asked.append((call.step, call.branch))
        return call.step in self.steps

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        self.shown.append((call.step, call.branch))
        torch.testing.assert_close(velocity - call.x, residual)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_an_online_cache_is_the_planned_one_when_it_decides_the_same(site):
    """Bit for bit the same clip, forwards and cache bytes as the plan with that mask.

    Mutants: a residual of the other branch, the step counted by calls, the cache left on, state kept between calls.
    """
    pipe = build_pipe()
    before, own = run(pipe), pipe.scheduler
    sigmas = pipe.scheduler.sigmas.numpy()
    mask = tuple(step in (0, 1, 4, 6) for step in range(STEPS))
    with erta.cached(pipe, erta.Plan(mask=mask, sigmas=sigmas, site=site)) as planned:
        expected = run(pipe)
    rule = Scripted(1, 4, 6)
    rule.computed = lambda *_: None
    with online(pipe, rule, site) as trace:
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)  # nothing is left of the first call
        assert trace.forwards == {"cond": 4, "uncond": 4} == planned.forwards and trace.calls == 2
        assert trace.cache_bytes == planned.cache_bytes > 0 and "forwards cond: 4, uncond: 4, of 8" in trace.summary()
        with pytest.raises(erta.InstallError, match="installed"):
            erta.install(pipe, erta.Plan(mask=mask, sigmas=sigmas))
    assert rule.begun == [STEPS, STEPS]
    assert rule.asked == [(step, branch) for step in range(1, STEPS) for branch in ("cond", "uncond")]
    assert torch.equal(run(pipe), before) and pipe.scheduler is own


def test_a_rule_sees_every_forward_and_resets_after_an_exception():
    pipe = build_pipe()
    rule = Scripted(2)
    with online(pipe, rule):
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=lambda *_: 1 / 0)
        first = run(pipe)
        assert rule.shown == [(0, "cond"), (0, "uncond"), (2, "cond"), (2, "uncond")]
    with online(build_pipe(), Scripted(2)):
        pass
    with online(pipe, Scripted(2)):
        assert torch.equal(run(pipe), first)


def test_a_run_that_computes_everything_says_so():
    pipe = build_pipe()
    before = run(pipe)
    with online(pipe, Scripted(*range(STEPS))) as trace:
        assert torch.equal(run(pipe), before)
    assert not trace.reused_anything() and trace.summary().startswith("did not reuse anything")


def test_an_interrupted_pipeline_says_so():
    """Mutants: half a run passes for a whole one, or is an error."""
    pipe = build_pipe()

    def stop(pipe, step, timestep, values):
        pipe._interrupt = step >= 3
        return values

    with online(pipe, Scripted(2)) as trace:
        run(pipe, callback_on_step_end=stop)
        assert trace.interrupted and trace.summary() == "interrupted after 4 of 8 steps"
        run(pipe)
        assert not trace.interrupted and trace.num_executed == STEPS
