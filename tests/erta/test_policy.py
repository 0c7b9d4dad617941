"""Schedules against masks worked out by hand. Mutants caught: `<` for `<=`, accumulating, a stale source."""

import numpy as np
import pytest

from erta.errors import BudgetError
from erta.policy import budget_mask, reuse_errors, sources, steps_for_speedup, threshold_mask, uniform_mask

N, WINDOW = 6, 4


def profile() -> np.ndarray:
    """rel_l1 of a residual that moves by 1 a step on a scale of 10: gap m costs m / 10, step 3 costs 5 more."""
    table = np.full((N, WINDOW), np.nan)
    position = np.array([0, 1, 2, 7, 8, 9], dtype=float)
    for step in range(N):
        for gap in range(1, min(step, WINDOW) + 1):
            table[step, gap - 1] = (position[step] - position[step - gap]) / 10
    return table


def as_text(mask) -> str:
    return "".join("C" if computed else "r" for computed in mask)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, "CCCCCC"), (0.1, "CCCCCC"), (0.11, "CrCCrC"), (0.21, "CrrCrr"), (0.75, "CrrrCr"), (9.0, "CrrrrC")],
)
def test_threshold_rule_by_hand(threshold, expected):
    # 0.1: the rule is strict, an error equal to the threshold is computed. 9.0: the window of 4 forces step 5.
    assert as_text(threshold_mask(profile(), threshold)) == expected


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_budget_is_met_exactly(count):
    mask = budget_mask(profile(), count)
    assert sum(mask) == count and mask[0]


def test_budget_spends_the_rest_on_the_largest_error():
    # 3 cannot be had by a threshold: 0.21 gives 2, the largest error left is step 2 (0.2, as is step 5; first wins)
    assert as_text(budget_mask(profile(), 2)) in ("CrrCrr", "CrrrCr", "CrrrrC")
    errors = reuse_errors(profile(), (True, False, False, True, False, False))
    np.testing.assert_allclose(errors, [0, 0.1, 0.2, 0, 0.1, 0.2])
    assert as_text(budget_mask(profile(), 3)) == "CrCCrr"


def test_threshold_is_not_monotone_and_budget_copes():
    table = np.full((4, 3), np.nan)
    table[1, 0], table[2, 0], table[2, 1], table[3, 0], table[3, 1], table[3, 2] = 0.3, 0.1, 0.9, 0.9, 0.1, 0.9
    low, high = threshold_mask(table, 0.2), threshold_mask(table, 0.4)
    assert as_text(low) == "CCrr" and as_text(high) == "CrCC"  # more threshold, more computed steps
    assert sum(budget_mask(table, 2)) == 2


def test_budget_that_the_window_forbids():
    with pytest.raises(BudgetError, match="window"):
        budget_mask(profile(), 1)


@pytest.mark.parametrize(("steps", "count", "expected"), [(6, 3, "CrCrCr"), (5, 2, "CrCrr"), (4, 4, "CCCC")])
def test_uniform(steps, count, expected):
    assert as_text(uniform_mask(steps, count)) == expected


def test_sources():
    assert sources((True, False, False, True, False)) == [0, 0, 0, 3, 3]


def test_steps_for_speedup():
    assert steps_for_speedup(50, 2.0) == 25
    assert steps_for_speedup(50, 3.0) == 16  # at least the speed-up that was asked for
    assert steps_for_speedup(30, 1.0) == 30
    with pytest.raises(BudgetError, match="largest is 50"):
        steps_for_speedup(50, 100)
    for bad in (0.5, -1, float("nan")):
        with pytest.raises(BudgetError):
            steps_for_speedup(50, bad)


@pytest.mark.parametrize("bad", [0, 7, -1])
def test_count_out_of_range(bad):
    with pytest.raises(BudgetError):
        uniform_mask(6, bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_bad_threshold(bad):
    with pytest.raises(BudgetError, match="threshold"):
        threshold_mask(profile(), bad)
