"""Paired differences and their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: np.ndarray, seed: int = 0) -> Interval:
    """Mean of paired differences and its 95 % percentile bootstrap interval."""
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = values[rng.integers(0, len(values), size=(BOOTSTRAP_DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def mean_psnr(values: list[float | None]) -> float | None:
    """Mean over samples; None if every sample is identical, which no number of decibels describes."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
