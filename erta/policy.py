"""Which steps are computed. Pure functions on the profile of residual changes (ERTACache, section on the policy).

A profile is an array `rel_l1[i, m - 1]`: the relative L1 change of the residual from step i - m to step i,
for m = 1 … window; entries with i < m are not used. A mask holds True where the transformer is run.

Where a second transformer takes over at step `takeover`, a residual of one never stands in for the other's: the
profile is NaN for such a pair, and the first step of each is computed.
"""

from __future__ import annotations

import numpy as np

from erta.errors import BudgetError

Mask = tuple[bool, ...]


def segments(num_steps: int, takeover: int | None) -> tuple[range, ...]:
    """The steps of each transformer that runs at all: one range, or two that meet at `takeover`."""
    if takeover is None or not 0 < takeover < num_steps:
        return (range(num_steps),)
    return range(takeover), range(takeover, num_steps)


def threshold_mask(rel_l1: np.ndarray, threshold: float) -> Mask:
    """The greedy rule of ERTACache, "Offline policy from residual profiling": reuse step i iff `rel_l1(c, i) < threshold`,
    c the last computed step.

    Not accumulated. Step 0 is computed, and so is whatever lies farther from c than the profile's window, or where
    the profile is NaN.
    """
    if not threshold >= 0:
        raise BudgetError(f"threshold must be a number ≥ 0, not {threshold!r}")
    num_steps, window = rel_l1.shape
    mask, last = [True], 0
    for step in range(1, num_steps):
        gap = step - last
        compute = gap > window or not rel_l1[step, gap - 1] < threshold
        mask.append(compute)
        last = step if compute else last
    return tuple(mask)


def budget_mask(rel_l1: np.ndarray, num_computed: int, takeover: int | None = None) -> Mask:
    """The paper's rule with exactly `num_computed` computed steps.

    The rule is not monotone in the threshold and misses some counts, so every value of the profile is tried:
    the smallest threshold that leaves at most `num_computed` steps is taken, and what remains of the budget
    goes, one by one, to the reused step with the largest error.

    Raises BudgetError if the window is too short for so few computed steps, or there are fewer than transformers.
    """
    num_steps, window = rel_l1.shape
    check_count(num_computed, num_steps, takeover)
    for threshold in [0.0, *np.unique(rel_l1[np.isfinite(rel_l1)]), np.inf]:
        mask = list(threshold_mask(rel_l1, float(np.nextafter(threshold, np.inf)) if threshold else 0.0))
        if sum(mask) <= num_computed:
            break
    else:
        raise BudgetError(
            f"{num_computed} computed steps need reuse over more than {window} steps, the calibration's window; "
            "ask for more steps or calibrate with a larger window"
        )
    while sum(mask) < num_computed:
        errors = reuse_errors(rel_l1, tuple(mask))
        mask[int(np.argmax(errors))] = True
    return tuple(mask)


def uniform_mask(num_steps: int, num_computed: int, takeover: int | None = None) -> Mask:
    """`num_computed` steps spread evenly, the first always among them; over each of two transformers by its length."""
    check_count(num_computed, num_steps, takeover)
    parts = segments(num_steps, takeover)
    if len(parts) == 2:
        first, second = map(len, parts)
        share = round(num_computed * first / num_steps)
        share = min(max(share, 1, num_computed - second), first, num_computed - 1)
        return uniform_mask(first, share) + uniform_mask(second, num_computed - share)
    computed = {(k * num_steps) // num_computed for k in range(num_computed)}
    return tuple(step in computed for step in range(num_steps))


def reuse_errors(rel_l1: np.ndarray, mask: Mask) -> np.ndarray:
    """Relative L1 error of each step under a mask: 0 where computed, (num_steps,)."""
    errors = np.zeros(len(mask))
    for step, source in enumerate(sources(mask)):
        if source != step:
            errors[step] = rel_l1[step, step - source - 1]
    return errors


def sources(mask: Mask) -> list[int]:
    """For each step the computed step whose residual stands in: the step itself where it is computed."""
    result, last = [], 0
    for step, computed in enumerate(mask):
        last = step if computed else last
        result.append(last)
    return result


def steps_for_speedup(num_steps: int, speedup: float, takeover: int | None = None) -> int:
    """The most computed steps that still promise `speedup` in forwards: floor(num_steps / speedup)."""
    if not speedup >= 1:
        raise BudgetError(f"speedup must be a number ≥ 1, not {speedup!r}")
    count = int(num_steps / speedup + 1e-9)
    least = len(segments(num_steps, takeover))
    if count < least:
        always = "one step is" if least == 1 else "the first step of each of the two transformers is"
        raise BudgetError(
            f"speedup {speedup:g} cannot be reached with {num_steps} steps: {always} always computed, "
            f"so the largest is {num_steps / least:g}"
        )
    return count


def check_count(num_computed: int, num_steps: int, takeover: int | None = None) -> None:
    """Raise BudgetError unless num_computed lies between one for each transformer that runs, and num_steps."""
    if not isinstance(num_computed, (int, np.integer)) or isinstance(num_computed, bool):
        raise BudgetError(f"the number of computed steps must be a whole number, not {num_computed!r}")
    least = len(segments(num_steps, takeover))
    if not least <= num_computed <= num_steps:
        why = ": the first step of each of the two transformers is always computed" if least == 2 else ""
        raise BudgetError(
            f"{num_computed} computed steps asked for, but there are {least} to {num_steps} to choose from{why}"
        )
