"""The methods that we compare with: each rule by hand, in the harness, and against another implementation."""

from __future__ import annotations

import json

import pytest
import torch

import erta
from erta.online import Call, OnlineRule, online
from experiments.peers.easycache import EasyCache
from experiments.peers.knob import Knob, search
from experiments.record import read_lines
from tests.conftest import STEPS, build_pipe, run
from tests.test_cli import command, folders, weights  # noqa: F401
from tests.test_sites import FLUX_CALL, build_flux, generate


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


def test_an_interrupted_pipeline_is_refused():
    """Mutant: the check at the end of a call left out, so half a run passes for a whole one."""
    pipe = build_pipe()

    def stop(pipe, step, timestep, values):
        pipe._interrupt = step >= 3
        return values

    with online(pipe, Scripted(2)), pytest.raises(erta.ExecutionMismatch, match="called at 4 steps"):
        run(pipe, callback_on_step_end=stop)


def decisions(rule: OnlineRule, xs, velocity, branches=("cond",)) -> dict[str, list[bool]]:
    """What a rule decides along made-up inputs (num_steps) of one value each; `velocity(step, branch)` is the output."""
    rule.begin(len(xs))
    made: dict[str, list[bool]] = {branch: [] for branch in branches}
    for step, value in enumerate(xs):
        for branch in branches:
            call = Call(step, len(xs), branch, torch.full((1, 1, 4), float(value)), torch.nn.Identity())
            compute = not made[branch] or rule.should_compute(call)
            made[branch].append(compute)
            if compute:
                v = torch.full_like(call.x, float(velocity(step, branch)))
                rule.computed(call, v, v - call.x)
    return made


def test_easycache_by_hand():
    """warmup 2, tau 0.5; inputs 10, 8, 7, 6, 4, 3, 2, 1, outputs 2, 4, 5 (step 2) …

    steps 0, 1: warm-up; k = |4 - 2| / |8 - 10| = 1
    step 2: acc = 1 · |7 - 8| / 4 = 0.25 < 0.5: reused
    step 3: acc += |6 - 7| / 4 = 0.5, not below 0.5: computed; v = 8; k = |8 - 4| / |6 - 8| = 2; acc = 0
    step 4: acc = 2 · |4 - 6| / 8 = 0.5: computed; v = 16; k = |16 - 8| / |4 - 6| = 4
    step 5: acc = 4 · |3 - 4| / 16 = 0.25: reused
    step 6: acc += 4 · |2 - 3| / 16 = 0.5: computed; v = 32; k = |32 - 16| / |2 - 4| = 8
    step 7: acc = 8 · 1 / 32 = 0.25, but the last step is computed

    Mutants: k from the last step instead of the last computed one, the sum not cleared, `<=` for `<`, the input's
    change since the last computed step added up, the last step reused.
    """
    xs, v = [10, 8, 7, 6, 4, 3, 2, 1], {0: 2, 1: 4, 3: 8, 4: 16, 6: 32, 7: 64}
    made = decisions(EasyCache(0.5, warmup=2), xs, lambda step, branch: v[step])
    assert made["cond"] == [True, True, False, True, True, False, True, True]


def test_easycache_decides_for_both_branches_by_the_first():
    """The second branch's outputs (k = 0 of its own) change nothing. Mutant: a decision for each branch."""
    xs, v = [10, 8, 7, 6, 4, 3, 2, 1], {0: 2, 1: 4, 3: 8, 4: 16, 6: 32, 7: 64}
    both = decisions(EasyCache(0.5, 2), xs, lambda step, b: v[step] if b == "cond" else 1, ("cond", "uncond"))
    assert both["cond"] == both["uncond"] == [True, True, False, True, True, False, True, True]


def test_options_are_checked():
    with pytest.raises(erta.ErtaError, match="options.warmup must be a whole number ≥ 1, not 0"):
        EasyCache(0.1, warmup=0)
    with pytest.raises(erta.ErtaError, match="options.tau must be a number ≥ 0, not 'much'"):
        EasyCache("much")


def test_search_meets_the_budget_or_says_what_can_be_met():
    """Counts that fall with the knob as 40 / value, down to 10. Mutants: bisection turned round, arithmetic halves."""
    report = search(lambda value: max(10.0, 40 / value), Knob("tau", 1e-2, 1e2), 25, "m", 50)
    assert report["computed"] == pytest.approx(25, abs=0.5) and report["value"] == pytest.approx(1.6, rel=0.03)
    assert 3 <= len(report["tried"]) <= 14
    with pytest.raises(erta.BudgetError, match="reaches 10 to 50"):
        search(lambda value: max(10.0, 40 / value), Knob("tau", 1e-2, 1e2), 9, "m", 50)
    # whole numbers 1 … 8 give 50, 26, 18, 14, 11.2 …: 20 cannot be met, 18 is the most below it; 26 can
    jumps = {1: 50, 2: 26, 3: 18, 4: 14, 5: 11, 6: 9, 7: 8, 8: 7}
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 20, "m", 50)["value"] == 3
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 26, "m", 50)["value"] == 2
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 50, "m", 50)["value"] == 1


def test_online_on_a_model_with_one_forward_a_step():
    """FLUX: packed tokens, no second branch."""
    pipe = build_flux()
    before = generate(pipe, FLUX_CALL)
    with online(pipe, EasyCache(0.6, warmup=2)) as trace:
        cached = generate(pipe, FLUX_CALL)
    assert 3 <= trace.forwards["cond"] < 6 and list(trace.forwards) == ["cond"]
    assert 0 < (cached - before).abs().mean() < before.abs().mean()
    assert torch.equal(generate(pipe, FLUX_CALL), before)


PEERS = {
    "easycache": ["cache.options.warmup=2"],
}


@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Through the command line: the budget is met on calibration prompts, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=4", *PEERS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    report, rows = record["plan_report"], read_lines(folder / "per_prompt.jsonl")
    assert report["asked"] == 4 and report["computed"] <= 4.5 and f"{report['knob']}=" in printed
    made = [row["cached"]["forwards"] for row in rows]
    assert record["timing"]["forwards"] == pytest.approx(sum(made) / 3) and max(made) < 12
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and record["steps"]["total"] == 6
    assert record["steps"]["mask"] == rows[0]["cached"]["mask"] and record["steps"]["without_reuse"] == 0
    assert record["metrics"]["psnr_db"] > 0 and record["memory"]["cache_bytes"] > 0
    assert (folder / "figures" / "step_map.png").stat().st_size > 5000


def test_a_knob_by_its_own_key_and_a_run_that_reuses_nothing(command, tmp_path):  # noqa: F811
    """Mutants: the knob ignored, two budgets at once accepted, an idle cache reported as identical."""
    code, printed = command("cache=easycache", "bench=fidelity", "cache.options.tau=0", "cache.options.warmup=2")
    assert code == 0 and "did not reuse anything: 3 of 3 samples" in printed and "identical" not in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"]["without_reuse"] == 3 and record["plan_report"] == {"knob": "tau", "value": 0}
    code, printed = command("cache=easycache", "cache.options.tau=0.1", "cache.steps=3")
    assert code == 1 and "cache.options.tau and cache.steps at once" in printed
    code, printed = command("cache=easycache", "cache.steps=3", "cache.options.warmup=4")
    assert code == 1 and "reaches 5 to 6" in printed
    code, printed = command("cache=easycache", "cache.options.tua=0.1")
    assert code == 1 and "unknown key cache.options.tua" in printed
