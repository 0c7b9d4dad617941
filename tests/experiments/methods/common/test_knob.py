"""Equal budgets by a knob."""

from __future__ import annotations

import json

import pytest

import erta
from experiments.methods.common.knob import Knob, search
from experiments.methods.easycache import EasyCache
from tests.commands import folders


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
    with pytest.raises(erta.BudgetError, match="cache=m did not reuse anything: also with tau=100 all 50 steps"):
        search(lambda value: 50.0, Knob("tau", 1e-2, 1e2), 25, "m", 50)
    # whole numbers 1 … 8 give 50, 26, 18, 14, 11.2 …: 20 cannot be met, 18 is the most below it; 26 can
    jumps = {1: 50, 2: 26, 3: 18, 4: 14, 5: 11, 6: 9, 7: 8, 8: 7}
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 20, "m", 50)["value"] == 3
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 26, "m", 50)["value"] == 2
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 50, "m", 50)["value"] == 1


@pytest.mark.slow
def test_a_knob_by_its_own_key_and_a_run_that_reuses_nothing(command, tmp_path):
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
    code, printed = command("cache=sencache", "cache.options.epsilon=-1")
    assert code == 1 and "cache.options.epsilon must be ≥ 0, not -1" in printed and "uncached runs" not in printed
    code, printed = command("cache=fewer_steps", "cache.options.sampler=heun")
    assert code == 1 and "cache.options.sampler" in printed and "unipc" in printed and "no such file" not in printed
    code, printed = command("cache=easycache", "cache.options.tua=0.1")
    assert code == 1 and "unknown key cache.options.tua" in printed
