"""Explicit error rectification in closed form (ERTACache): predict the cache error from the cached output.

The paper models `err ≈ sigmoid(K v_cached + B)`, linearises the sigmoid and fits by least squares. By default
we evaluate what was fitted, the linear form: `err_hat = mean(err) + (S_ve / S_vv) (v_cached - mean(v_cached))`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Centred moments of `v_cached` (v) and `err` over samples and positions; arrays of one shape, (…, channels)."""

    count: np.ndarray
    mean_v: np.ndarray
    mean_e: np.ndarray
    s_vv: np.ndarray  # sum of (v - mean_v)^2
    s_ve: np.ndarray  # sum of (v - mean_v)(e - mean_e)
    s_ee: np.ndarray  # sum of (e - mean_e)^2

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan's update); where both are empty the result is empty."""
        count = self.count + other.count
        safe = np.maximum(count, 1.0)
        dv, de = other.mean_v - self.mean_v, other.mean_e - self.mean_e
        weight = self.count * other.count / safe
        share = other.count / safe
        return Moments(
            count=count,
            mean_v=self.mean_v + dv * share,
            mean_e=self.mean_e + de * share,
            s_vv=self.s_vv + other.s_vv + dv * dv * weight,
            s_ve=self.s_ve + other.s_ve + dv * de * weight,
            s_ee=self.s_ee + other.s_ee + de * de * weight,
        )

    def pooled(self) -> Moments:
        """Moments over all channels together, on a last axis of length 1."""
        parts = [
            Moments(*(getattr(self, item.name)[..., k : k + 1] for item in fields(self)))
            for k in range(self.count.shape[-1])
        ]
        return reduce(Moments.merge, parts)


@dataclass(frozen=True)
class LinearRectifier:
    """`v_hat = gain * v_cached + offset`, that is `v_cached - err_hat`. `r2` is the fit's share of explained error."""

    gain: np.ndarray
    offset: np.ndarray
    r2: np.ndarray


def fit_linear(moments: Moments) -> LinearRectifier:
    """Least squares of err on v_cached: ERTACache, "Explicit error rectification", K = 4 S_ve / S_vv, linearised.

    A channel without variance gets the mean error only.
    """
    varied = moments.s_vv > 0
    slope = np.where(varied, moments.s_ve / np.where(varied, moments.s_vv, 1.0), 0.0)
    explained = slope * moments.s_ve
    r2 = np.where(moments.s_ee > 0, explained / np.where(moments.s_ee > 0, moments.s_ee, 1.0), 0.0)
    return LinearRectifier(gain=1.0 - slope, offset=slope * moments.mean_v - moments.mean_e, r2=r2)
