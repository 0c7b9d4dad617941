"""Paired intervals."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.intervals import paired_interval


def test_paired_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    interval = paired_interval(rng.normal(0.5, 1.0, 200))
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.15)
    assert paired_interval(np.full(5, 2.0)).low == 2.0
