"""The plot of a sweep: PSNR and speed-up against the one number that was swept, or against each other.

Series differ in colour (Okabe and Ito, without the yellow that a white page swallows), in marker and in line, so that they
are told apart in grey too.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from analysis.row_plots import MARKER_PX, Point, name_points
from analysis.style import COLOURS, COMPUTED, DASHES, GREY, MARKERS, REUSED, WIDTH

LABELS = ("seed",)  # keys whose numbers are names, not amounts
WIDE_RANGE = 8  # largest over smallest value from which on an axis is logarithmic
MOST_TICKS, MOST_SERIES, MOST_NAMES = 8, 14, 30


def numbers_of(runs: pd.DataFrame, key: str) -> np.ndarray | None:
    """The values of a swept key, (runs,); None if they are no amounts."""
    if key in LABELS:
        return None
    values = pd.to_numeric(runs[key], errors="coerce").to_numpy(float)
    return values if np.isfinite(values).all() else None


def figure(runs: pd.DataFrame, keys: list[str], target_psnr_db: float | None = None) -> Figure:
    """Of finished runs that have a PSNR, a row each (see `analysis.sweeps.Sweep`), over the swept `keys`."""
    values = numbers_of(runs, keys[0]) if len(keys) == 1 else None
    if values is not None:
        return _over_numbers(runs, keys[0], values, target_psnr_db)
    return _against_each_other(runs, keys, target_psnr_db)


def _over_numbers(runs: pd.DataFrame, key: str, values: np.ndarray, target: float | None) -> Figure:
    """Two panels below each other: PSNR with its interval and worst prompt, and the speed-ups with the computed steps."""
    order = np.argsort(values, kind="stable")
    runs, values = runs.iloc[order], values[order]
    made = Figure((WIDTH, 5))
    top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for panel in (top, bottom):
        panel.grid(color=GREY, alpha=0.25, lw=0.5)
        panel.margins(x=0.04, y=0.15)
    top.errorbar(values, runs.psnr_db, _bars(runs), color=COMPUTED, marker="o", capsize=3, label="mean, 95 % interval")
    worst = runs.psnr_worst_db.to_numpy(float)
    top.plot(values, worst, "v", color=COMPUTED, mfc="white", ms=5, label="worst prompt")
    _draw_target(top, target)
    top.set(ylabel="PSNR against uncached, dB")
    measured = runs.speedup.to_numpy(float)
    bottom.plot(values, measured, "-s", color=REUSED, mec="#7a5200", ms=5, label="measured")
    bottom.plot(values, runs.speedup_possible.to_numpy(float), "--", color="#333333", lw=1, label="possible")
    if len(runs) <= MOST_TICKS and key != "cache.steps":
        for x, y, count in zip(values, measured, runs.computed, strict=True):
            about = f"{count:.4g} steps"
            bottom.annotate(about, (x, y), (0, -7), textcoords="offset points", ha="center", va="top", fontsize=8)
        bottom.margins(y=0.35)
    bottom.set(xlabel=key, ylabel="speed-up of denoising")
    bottom.yaxis.set_major_formatter("{x:g}×")
    if values.min() > 0 and values.max() / values.min() >= WIDE_RANGE:
        bottom.set_xscale("log")
    if len(set(values)) <= MOST_TICKS:
        bottom.set_xticks(sorted(set(values)), [f"{value:.4g}" for value in sorted(set(values))])
        bottom.minorticks_off()
    for panel in (top, bottom):
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return made


def _against_each_other(runs: pd.DataFrame, keys: list[str], target: float | None) -> Figure:
    """PSNR against the measured speed-up: a series a value of one key, its points named by the other keys."""
    series_key, others = _roles(runs, keys)
    if series_key:
        runs = runs.assign(**{series_key: runs[series_key].map(lambda value: short(value) or "as set")})
    made = Figure((WIDTH, 5.2))
    axis = made.subplots()
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    values = list(dict.fromkeys(runs[series_key])) if series_key else []
    groups = [(value, runs[runs[series_key] == value]) for value in values] or [("", runs)]
    for place, (value, group) in enumerate(groups):
        group = group.sort_values("speedup")
        line = DASHES[place // len(COLOURS) % len(DASHES)] if series_key and others else ""
        axis.errorbar(
            group.speedup,
            group.psnr_db,
            _bars(group),
            label=f"{series_key}={value}" if series_key else None,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            ls=line,
            ms=6,
            lw=1.3,
            elinewidth=0.8,
        )
    _draw_target(axis, target)
    axis.set(xlabel="measured speed-up of denoising", ylabel="PSNR against uncached, mean and 95 % interval, dB")
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.margins(0.1)
    if series_key and len(groups) <= MOST_SERIES:
        made.legend(loc="outside upper center", ncols=min(4, len(groups)))
    names = [" ".join(short(run[key]) for key in others) for _, run in runs.iterrows()]
    if others and len(runs) <= MOST_NAMES:
        axis.set_title(f"points: {', '.join(others)}", loc="right", color="#555555")
        made.draw_without_rendering()  # settles the layout: room for names is looked for in pixels
        rows = zip(names, runs.iterrows(), strict=True)
        name_points(axis, [_point(name, run) for name, (_, run) in rows], _covered(axis, groups))
    return made


def _roles(runs: pd.DataFrame, keys: list[str]) -> tuple[str | None, list[str]]:
    """The key whose values are series, the first that is no number, else the one with fewest values; and the others."""
    chosen = next(
        (key for key in keys if numbers_of(runs, key) is None), min(keys, key=lambda key: runs[key].nunique())
    )
    if runs[chosen].nunique() > MOST_SERIES:  # drawn by a sampler: no two runs have the same
        return None, keys
    return chosen, [key for key in keys if key != chosen]


def _point(name: str, run: pd.Series) -> Point:
    return Point(name, "planned", int(run.computed), run.psnr_db, run.psnr_low_db, run.psnr_high_db, run.speedup, False)


def _covered(axis: Axes, groups: list[tuple[str, pd.DataFrame]]) -> list[Bbox]:
    """What markers, lines and error bars cover, in pixels: a small box at every few pixels of a line."""
    boxes = []
    for _, group in groups:
        ends = group.sort_values("speedup")[["speedup", "psnr_db"]].to_numpy(float)
        low, high = ends[:, 1] - _bars(group.sort_values("speedup"))[0], ends[:, 1]
        bars = [np.array([[x, down], [x, up]]) for x, down, up in zip(ends[:, 0], low, high, strict=True)]
        for corners in [*itertools.pairwise(ends), *bars, *zip(ends, ends, strict=True)]:
            start, stop = axis.transData.transform(np.array(corners))
            count = 2 + int(np.hypot(*(stop - start)) // MARKER_PX)
            boxes += [Bbox([at - 3, at + 3]) for at in np.linspace(start, stop, count)]
        boxes += [Bbox([at - MARKER_PX, at + MARKER_PX]) for at in axis.transData.transform(ends)]
    return boxes


def _bars(runs: pd.DataFrame) -> np.ndarray:
    """(2, runs): from the mean down to the interval's lower end and up to its upper one; none of one prompt."""
    mean, low, high = (runs[name].to_numpy(float) for name in ("psnr_db", "psnr_low_db", "psnr_high_db"))
    return np.nan_to_num(np.maximum([mean - low, high - mean], 0))


def _draw_target(axis: Axes, target: float | None) -> Line2D | None:
    if target is None:
        return None
    return axis.axhline(target, color="black", lw=1, ls="-.", label=f"target, {target:g} dB", zorder=1)


def short(value: str | None, digits: int = 3) -> str:
    """A swept value as text; a number with more digits, such as a sampler draws, is rounded."""
    try:
        return "" if value is None else min(value, f"{float(value):.{digits}g}", key=len)
    except ValueError:
        return value or ""
