"""A calibration carried over to another number of steps, by interpolation in sigma.

Never done unasked: a plan from it says so in its report. Statistics of a pair (c, i) are taken as a function of
the two sigmas, known on the calibrated grid, zero where both are equal, and interpolated linearly in step index.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from erta.calibration import Calibration
from erta.errors import ErtaError
from erta.grid import check_grid
from erta.rectifier import Moments
from erta.statistics import PairStatistics, Spread


def interpolate(calibration: Calibration, sigmas: np.ndarray) -> Calibration:
    """`calibration` for the grid `sigmas` (num_steps + 1,), inside the range of its own.

    Pairs farther apart than its window stay unknown. Counts of samples become one, so spreads are not carried
    over; the time of a generation is scaled to the new number of steps. Raises ErtaError for a grid that reaches beyond the
    calibrated one, and for a calibration of two transformers or of a part of a schedule.
    """
    if calibration.signature.get("begin"):
        raise ErtaError("a calibration of a part of a schedule (strength below 1) is not interpolated: calibrate anew")
    if calibration.takeover is not None:
        raise ErtaError(
            "a calibration of two transformers is not interpolated, since their statistics do not continue each "
            "other: calibrate with this number of steps"
        )
    sigmas = np.asarray(sigmas, np.float64)
    own = np.array(calibration.signature["sigmas"], np.float64)
    check_grid(sigmas.astype(np.float32))
    if sigmas[0] > own[0] * (1 + 1e-3) or sigmas[-2] < own[-2] * 0.5:
        raise ErtaError(
            f"sigmas from {sigmas[0]:.4f} to {sigmas[-2]:.4f} reach beyond the calibrated {own[0]:.4f} to {own[-2]:.4f}: "
            "statistics are not extrapolated. Calibrate with this number of steps."
        )
    places = np.interp(-sigmas[:-1], -own[:-1], np.arange(len(own) - 1))
    statistics = calibration.statistics
    tables = _Tables(places, statistics.rel_l1.mean.shape[2])
    count = np.broadcast_to(tables.known, statistics.rel_l1.mean.shape[:1] + tables.known.shape).astype(float)

    def spread(part: Spread) -> Spread:
        return Spread(count, np.where(count > 0, tables.carry(part.mean, axis=1), 0.0), count * 0)

    moments, samples = statistics.moments, np.maximum(statistics.moments.count, 1)
    per_sample = {item.name: getattr(moments, item.name) for item in fields(Moments)}
    for name in ("s_vv", "s_ve", "s_ee"):
        per_sample[name] = per_sample[name] / samples
    vanish = {"mean_e", "s_ve", "s_ee", "count"}  # at equal sigmas; the velocity's own moments do not
    carried = {name: tables.carry(value, axis=1, zero=name in vanish) for name, value in per_sample.items()}
    carried["count"] = np.broadcast_to(tables.known[None, :, :, None], carried["count"].shape).astype(float)
    found = PairStatistics(
        spread(statistics.rel_l1),
        spread(statistics.phi_ratio),
        Moments(**{name: np.where(carried["count"] > 0, value, 0.0) for name, value in carried.items()}),
    )
    return replace(
        calibration,
        statistics=found,
        signature={**calibration.signature, "sigmas": [float(s) for s in sigmas.astype(np.float32)]},
        record={
            **calibration.record,
            "interpolated_from_steps": calibration.num_steps,
            "forward_s": calibration.record["forward_s"] * (len(sigmas) - 1) / calibration.num_steps,
        },
    )


class _Tables:
    """Bilinear interpolation of tables (…, num_steps, window, …) in the indices of both steps of a pair."""

    def __init__(self, places: np.ndarray, window: int) -> None:
        self.window, steps = window, len(places)
        later = np.repeat(places[:, None], window, 1)
        earlier = np.full((steps, window), np.nan)
        for gap in range(1, min(window, steps - 1) + 1):
            earlier[gap:, gap - 1] = places[:-gap]
        self.known = np.isfinite(earlier) & (np.ceil(later) - np.floor(earlier) <= window)
        self.later, self.earlier = later, np.where(self.known, earlier, later)

    def carry(self, table: np.ndarray, axis: int, zero: bool = True) -> np.ndarray:
        """The table at the new pairs. `zero`: it vanishes where both steps are one; else it is that of neighbours."""
        table = np.moveaxis(table, (axis, axis + 1), (0, 1))
        last, total = table.shape[0] - 1, np.zeros(())
        low_i, low_c = np.floor(self.later).astype(int), np.floor(self.earlier).astype(int)
        for i, weight_i in ((low_i, 1 - (self.later - low_i)), (low_i + 1, self.later - low_i)):
            for c, weight_c in ((low_c, 1 - (self.earlier - low_c)), (low_c + 1, self.earlier - low_c)):
                weight = (weight_i * weight_c).reshape(*self.later.shape, *[1] * (table.ndim - 2))
                total = total + weight * self._at(table, np.minimum(i, last), np.minimum(c, last), zero)
        return np.moveaxis(total, (0, 1), (axis, axis + 1))

    def _at(self, table: np.ndarray, i: np.ndarray, c: np.ndarray, zero: bool) -> np.ndarray:
        later, gap = np.maximum(i, c), np.abs(i - c)
        value = table[np.maximum(later, 1), np.clip(gap, 1, self.window) - 1]
        if not zero:
            return value
        # a change vanishes at one step and has the other sign on the way back
        return np.sign(i - c).reshape(*gap.shape, *[1] * (table.ndim - 2)) * value
