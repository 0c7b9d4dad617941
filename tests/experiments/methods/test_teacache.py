"""TeaCache, by hand."""

from __future__ import annotations

import numpy as np
import torch

from experiments.methods import teacache
from experiments.methods.teacache import TeaCache
from tests.experiments.methods.rules import decisions


def test_teacache_by_hand():
    """p(r) = 2 r, delta 1.25; signal 8, 10, 11.25, 14.0625, 14.0625, 17.578125, 17.578125

    step 1: r = 2 / 8 = 0.25, acc = 0.5: reused            (r is against the step before, computed or not)
    step 2: r = 1.25 / 10 = 0.125, acc = 0.75: reused      (against the computed step 0 it were 1.3125: computed)
    step 3: r = 2.8125 / 11.25 = 0.25, acc = 1.25, not below delta: computed, acc = 0
    step 4: r = 0: reused                                  (had acc not been cleared: computed)
    step 5: r = 0.25, acc = 0.5: reused
    step 6: the last step: computed

    A branch with another signal decides for itself. Mutants: those named, `>` for `>=`, one sum for both branches.
    """
    signal = [8, 10, 11.25, 14.0625, 14.0625, 17.578125, 17.578125]
    rule = TeaCache(1.25, [2, 0], lambda call: call.x if call.branch == "cond" else torch.ones(3))
    made = decisions(rule, signal, lambda *_: 1.0, ("cond", "uncond"))
    assert made["cond"] == [True, False, False, True, False, False, True]
    assert made["uncond"] == [True, False, False, False, False, False, True]


def test_teacache_polynomial():
    """A polynomial is found again; three different signals determine a parabola. Mutant: lowest power first."""
    r = np.linspace(0.1, 0.9, 30)
    np.testing.assert_allclose(
        teacache.fit(list(zip(r, 3 * r**2 - r + 0.5, strict=True))), [0, 0, 3, -1, 0.5], atol=1e-9
    )
    np.testing.assert_allclose(teacache.fit([(1, 2), (2, 5), (3, 10), (3, 10)]), [1, 0, 1], atol=1e-9)
