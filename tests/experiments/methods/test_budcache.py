"""BudCache: annealing over masks."""

from __future__ import annotations

import pytest

from experiments.methods.budcache import acceptance, anneal, temperature_at


def test_annealing_finds_the_best_mask():
    """10 steps, 5 computed, the first one (30 % of 5) fixed; the error counts steps that are not 0, 2, 3, 7, 9.

    Mutants: the prefix exchanged too, the last mask returned in place of the best, the budget not kept.
    """
    seen = []

    def error(mask):
        seen.append(mask)
        return float(sum(on != (k in (0, 2, 3, 7, 9)) for k, on in enumerate(mask)))

    mask, value = anneal(error, 10, 5, 200, seed=0)
    assert value == 0 and [k for k, on in enumerate(mask) if on] == [0, 2, 3, 7, 9]
    assert all(sum(tried) == 5 and tried[0] for tried in seen) and len(set(seen)) == len(seen)
    assert anneal(error, 10, 10, 5, 0)[0] == (True,) * 10


def test_annealing_accepts_by_chance():
    """Temperatures 1 → 0.1 → 0.01 over 3 trials; a rise of 0.5 is taken with probability exp(-0.5), exp(-5), exp(-50).

    Mutants: worse masks never taken, or whatever the temperature; a temperature that rises; the last mask returned.
    """
    assert [temperature_at(trial, 3) for trial in range(3)] == pytest.approx([1, 0.1, 0.01])
    assert [acceptance(0.5, t) for t in (1, 0.1, 0.01)] == pytest.approx([0.60653, 0.0067379, 1.9287e-22], rel=1e-4)
    assert acceptance(0.0, 0.01) == acceptance(-3.0, 1) == 1
    started = []

    def error(mask):
        started.append(mask)
        return float(len(started))  # every new mask is worse than all before

    mask, value = anneal(error, 12, 4, 60, seed=0)
    assert value == 1.0 and mask == started[0]  # the best, wherever the annealing went
    exchanged = [sum(a != b for a, b in zip(tried, started[0], strict=True)) // 2 for tried in started]
    assert max(exchanged) > 1  # masks beyond the first one's neighbours were tried, so a worse one was taken
