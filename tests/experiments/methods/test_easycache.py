"""EasyCache, by hand."""

from __future__ import annotations

from experiments.methods.easycache import EasyCache
from tests.experiments.methods.rules import decisions


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
