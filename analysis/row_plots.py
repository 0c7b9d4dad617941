"""Figures of the rows of a comparison: every method's PSNR by budget, and PSNR against measured speed-up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.records import ORACLE
from analysis.style import BAND, GREY, WIDTH

ROW_INCHES = 0.165
MARKER_PX = 9  # half of the largest
OFFSETS_PX = [  # of a name's near end from its point
    (reach * x, reach * y)
    for reach in (13, 26, 40, 60, 80, 100)
    for x, y in ((1, 0), (0.8, 0.8), (0.8, -0.8), (-1, 0), (-0.8, 0.8), (-0.8, -0.8), (0.3, 1), (0.3, -1))
]


@dataclass(frozen=True)
class Group:
    """What rows of one kind look like."""

    text: str
    colour: str
    marker: str


GROUPS = {
    "planned": Group("steps planned before the run", "#0072B2", "o"),
    "online": Group("decided while it runs", "#E69F00", "^"),
    "inside": Group("parts inside the model", "#009E73", "s"),
    "none": Group("no cache: fewer steps, grids", "#333333", "D"),
    ORACLE: Group("oracles: saw the test samples", "#CC79A7", "v"),
}


@dataclass(frozen=True)
class Point:
    """A row of a comparison at one budget, as the figures show it."""

    title: str  # display name
    group: str  # one of GROUPS
    budget: int  # computed steps; a panel each
    psnr_db: float  # mean over prompts
    low: float  # 95 % interval of that mean
    high: float
    speedup: float | None  # measured, of denoising; None: not timed
    is_reference: bool  # the method that the others are compared with: highlighted
    median: float | None = None  # over samples
    worst: float | None = None


def dot_plot_figure(points: list[Point], num_steps: int) -> Figure:
    """Every method's PSNR with its 95 % interval, best first: a panel a budget, each in its own order.

    Panels stand below each other: side by side, three columns of names leave no room for the dots on a page.
    """
    budgets = sorted({point.budget for point in points}, reverse=True) or [num_steps]
    by_budget = [sorted((p for p in points if p.budget == k), key=lambda p: -p.psnr_db) for k in budgets]
    rows = [max(1, len(here)) for here in by_budget]
    figure = Figure((WIDTH, 0.5 + 0.5 * len(rows) + ROW_INCHES * sum(rows)))
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    for panel, budget, here in zip(panels, budgets, by_budget, strict=True):
        _dots(panel, here)
        panel.set(ylim=(max(1, len(here)) - 0.4, -0.6), title=f"{budget} of {num_steps} steps computed")
    panels[-1].set_xlabel("PSNR against the uncached samples, dB: mean over prompts and its 95 % interval")
    spread = [("|", "median", "median"), ("x", "worst", "worst sample")]
    keys = [
        Line2D([], [], ls="", marker=marker, color="black", label=label)
        for marker, name, label in spread
        if any(getattr(point, name) is not None for point in points)
    ]
    figure.legend(handles=[*_group_keys(points), *keys], loc="outside upper center", ncols=4, handletextpad=0.2)
    return figure


def _dots(panel: Axes, points: list[Point]) -> None:
    """A row a point, from the top; the reference in bold, on a band and with a line at its mean."""
    panel.grid(axis="y", color=GREY, alpha=0.35, lw=0.5)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0, labelsize=8.5)
    panel.tick_params(axis="x", labelbottom=True)
    panel.set_axisbelow(True)
    panel.set_yticks(range(len(points)), [point.title for point in points])
    for row, point in enumerate(points):
        group = GROUPS[point.group]
        panel.plot([point.low, point.high], [row, row], color=group.colour, lw=1.6, alpha=0.6)
        panel.plot(point.psnr_db, row, group.marker, color=group.colour, ms=5)
        if point.median is not None:
            panel.plot(point.median, row, "|", color="black", ms=6)
        if point.worst is not None:
            panel.plot(point.worst, row, "x", color=group.colour, ms=3, alpha=0.8)
        if point.is_reference:
            panel.axhspan(row - 0.5, row + 0.5, color=BAND, lw=0, zorder=0)
            panel.axvline(point.psnr_db, color="black", lw=0.7, zorder=0.5)
            panel.get_yticklabels()[row].set_fontweight("bold")


def _group_keys(points: list[Point]) -> list[Line2D]:
    """Legend entries of the groups that occur."""
    occurring = {point.group for point in points}
    shown = [group for key, group in GROUPS.items() if key in occurring]
    return [Line2D([], [], ls="", marker=group.marker, color=group.colour, label=group.text) for group in shown]


def pareto_figure(points: list[Point]) -> Figure:
    """PSNR against measured speed-up of what was timed; only the front, a line, and the reference are named."""
    shown, best = timed(points), front(points)
    budgets = sorted({point.budget for point in shown}, reverse=True)
    sizes = dict(zip(budgets, np.linspace(8.5, 5, len(budgets)), strict=True))
    figure = Figure((WIDTH, 5.6))
    axis = figure.subplots()
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    speedups, decibels = np.repeat(_places(best), 2, axis=0).T
    (steps,) = axis.plot(speedups[:-1], decibels[1:], color=GREY, lw=1.5, zorder=1, label="nothing has more of both")
    for point, place in zip(shown, _places(shown), strict=True):
        group, edge = GROUPS[point.group], "black" if point.is_reference else "white"
        look = {"color": group.colour, "ms": sizes[point.budget], "mec": edge, "zorder": 2 + point.is_reference}
        axis.plot(*place, group.marker, mew=0.8, **look)
    axis.set(xlabel="measured speed-up of denoising", ylabel="PSNR against the uncached samples, dB")
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.margins(0.06)
    left, right = axis.get_xlim()
    axis.set_xlim(right=right + 0.1 * (right - left))  # room for the name of the fastest
    figure.legend(handles=_group_keys(shown), loc="outside upper center", ncols=4, handletextpad=0.2)
    keys = [Line2D([], [], ls="", marker="o", color=GREY, ms=sizes[k], label=f"{k} computed steps") for k in budgets]
    legend = axis.legend(handles=[steps, *keys], loc="upper right")
    figure.draw_without_rendering()  # settles the layout: room for names is looked for in pixels
    taken = [legend.get_window_extent(), *_covered(axis, shown, steps)]
    name_points(axis, [point for point in shown if point in best or point.is_reference], taken)
    return figure


def timed(points: list[Point]) -> list[Point]:
    """Those whose speed-up was measured."""
    return [point for point in points if point.speedup is not None]


def front(points: list[Point]) -> list[Point]:
    """The timed points that no other beats (as good in both PSNR and speed-up, better in one), slowest first.

    Oracles are no part of it.
    """
    counted = [point for point in points if point.group != ORACLE]
    by_speedup = sorted(((p.speedup, p.psnr_db, p) for p in counted if p.speedup is not None), key=lambda t: t[:2])
    return [
        point
        for speedup, psnr_db, point in by_speedup
        if not any(s >= speedup and db >= psnr_db and (s, db) != (speedup, psnr_db) for s, db, _ in by_speedup)
    ]


def _places(points: list[Point]) -> np.ndarray:
    """(points, 2): speed-up and PSNR."""
    return np.array([(point.speedup, point.psnr_db) for point in points], float).reshape(-1, 2)


def _covered(axis: Axes, points: list[Point], line: Line2D) -> list[Bbox]:
    """What the markers and the line's segments cover, in pixels."""
    centres, corners = (axis.transData.transform(xy) for xy in (_places(points), line.get_xydata()))
    ends = [*zip(centres, centres, strict=True), *itertools.pairwise(corners)]
    return [Bbox([np.minimum(*pair) - MARKER_PX, np.maximum(*pair) + MARKER_PX]) for pair in ends]


def name_points(axis: Axes, points: list[Point], taken: list[Bbox]) -> None:
    """Write every title at the nearest of `OFFSETS_PX` that covers fewest of `taken`, to which its own box is added."""
    for point, place in zip(points, _places(points), strict=True):
        note = axis.annotate(
            point.title,
            (place[0], place[1]),
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=8.5,
            fontweight="bold" if point.is_reference else "normal",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        start, size = axis.transData.transform(place), Text.get_window_extent(note).size
        corners = [np.array([x - size[0] * (x < 0), y - size[1] / 2]) for x, y in OFFSETS_PX]
        boxes = [Bbox([start + corner, start + corner + size]) for corner in corners]
        clashes = [box.count_overlaps(taken) + 9 * (not _within(box, axis.bbox)) for box in boxes]
        best = int(np.argmin(clashes))
        note.xyann = tuple(corners[best])
        taken += 3 * [boxes[best]]  # a name on a name is worse than one on a line


def _within(inner: Bbox, outer: Bbox) -> bool:
    return bool(outer.contains(*inner.min) and outer.contains(*inner.max))
