"""The figures of a run, of a comparison and of an error's decomposition.

Every figure is made for a page of about 900 px: `WIDTH` inches are shown on it, so a point of type is 1.4 px. Colours
are those of Okabe and Ito (2008), told apart in every kind of colour blindness; groups also have a marker of their own.
"""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from analysis.records import utf8

WIDTH = 9.0
COMPUTED, REUSED, GREY, BAND = "#0072B2", "#E69F00", "#8d99ae", "#F6EFC4"
ROW_INCHES = 0.165
SHEET_ROWS = 16
SMALL_FRAME_PX = 200  # wide; a row of a sheet shows twice as many of them
FACTORS = (1, 2, 5, 10, 20, 50)  # of a difference
MARKER_PX = 9  # half of the largest
OFFSETS_PX = [  # of a name's near end from its point
    (reach * x, reach * y)
    for reach in (13, 26, 40, 60, 80, 100)
    for x, y in ((1, 0), (0.8, 0.8), (0.8, -0.8), (-1, 0), (-0.8, 0.8), (-0.8, -0.8), (0.3, 1), (0.3, -1))
]
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "figure.dpi": 160,  # of the layout too
    }
)


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


def step_map(computed: list[int], grid: list[float], path: Path) -> None:
    """Save `step_map_figure`."""
    step_map_figure(computed, grid).savefig(path)


def step_map_figure(computed: list[int], grid: list[float]) -> Figure:
    """Computed and reused steps along the grid of sigmas that was integrated, one longer than the steps."""
    mask, sigmas = np.array(computed, bool), np.array(grid)
    figure = Figure((WIDTH, 3.2))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    steps = np.arange(len(mask))
    top.bar(steps[mask], 1, width=0.9, color=COMPUTED, label=f"computed ({mask.sum()})")
    if (~mask).any():
        top.bar(steps[~mask], 1, width=0.9, color=REUSED, label=f"reused ({(~mask).sum()})")
    top.set_yticks([])
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    bottom.plot(np.arange(len(sigmas)), sigmas, color=GREY, lw=1)
    bottom.scatter(steps[mask], sigmas[:-1][mask], s=14, color=COMPUTED, zorder=3)
    bottom.scatter(steps[~mask], sigmas[:-1][~mask], s=14, color=REUSED, zorder=3)
    bottom.set(xlabel="step", ylabel="sigma")
    return figure


def change_profile(mean: np.ndarray, std: np.ndarray, mask: list[int], path: Path) -> None:
    """Relative L1 change of the residual from one step to the next, with its spread over prompts."""
    figure = Figure((WIDTH, 3))
    axis = figure.subplots()
    steps = np.arange(len(mean))
    axis.plot(steps, mean, color=COMPUTED, label="mean over calibration prompts and guidance branches")
    axis.fill_between(steps, mean - std, mean + std, color=COMPUTED, alpha=0.2, label="± 1 standard deviation")
    for step in [k for k, computed in enumerate(mask) if not computed and len(mask) == len(mean)]:
        axis.axvspan(step - 0.5, step + 0.5, color=REUSED, alpha=0.15, lw=0)
    axis.set(xlabel="step i (shaded: reused)", ylabel="‖r[i-1] - r[i]‖₁ / ‖r[i]‖₁", yscale="log")
    axis.legend()
    figure.savefig(path)


def psnr_per_prompt(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR of every prompt against its uncached twin; identical clips have none and are marked."""
    figure = Figure((WIDTH, 2.8))
    axis = figure.subplots()
    values = [row["psnr_db"] for row in rows]
    shown = [value if value is not None else 0.0 for value in values]
    axis.bar(range(len(rows)), shown, color=COMPUTED)
    for index, value in enumerate(values):
        if value is None:
            inside = axis.get_xaxis_transform()  # y from the panel's bottom to its top, whatever the decibels
            axis.text(index, 0.03, "identical", rotation=90, ha="center", va="bottom", color=GREY, transform=inside)
    known = [value for value in values if value is not None]
    if known:
        axis.axhline(np.mean(known), color=REUSED, lw=1.5, label=f"mean {np.mean(known):.2f} dB")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1))
    axis.set(xlabel="prompt", ylabel="PSNR (dB)", xticks=range(len(rows)))
    figure.savefig(path)


def psnr_per_frame(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR by frame, mean over prompts ± 1 standard deviation; identical frames have none and are left out."""
    mean, std, identical = frame_profile(rows)
    figure = Figure((WIDTH, 2.8))
    axis = figure.subplots()
    frames = np.arange(len(mean))
    axis.plot(frames, mean, "o-", ms=3, color=COMPUTED, label="mean over prompts")
    axis.fill_between(frames, mean - std, mean + std, color=COMPUTED, alpha=0.2, label="± 1 standard deviation")
    if identical:
        axis.plot([], [], " ", label=f"{identical} identical frames left out")
    axis.set(xlabel="frame", ylabel="PSNR (dB)", xlim=(-0.5, len(mean) - 0.5))
    axis.legend()
    figure.savefig(path)


def frame_profile(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and deviation of PSNR over prompts by frame, (frames,) in dB each, NaN where every clip is identical; and
    how many frames are identical and left out of both."""
    values = np.ma.masked_invalid(np.array([row["frames"]["psnr_db"] for row in rows], float))
    identical = int(np.ma.getmaskarray(values).sum())
    return values.mean(0).filled(np.nan), values.std(0).filled(np.nan), identical


def dot_plot(points: list[Point], num_steps: int, path: Path) -> None:
    """Save `dot_plot_figure`."""
    dot_plot_figure(points, num_steps).savefig(path)


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
    figure.legend(handles=_group_keys(points), loc="outside upper center", ncols=4, handletextpad=0.2)
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
        if point.is_reference:
            panel.axhspan(row - 0.5, row + 0.5, color=BAND, lw=0, zorder=0)
            panel.axvline(point.psnr_db, color="black", lw=0.7, zorder=0.5)
            panel.get_yticklabels()[row].set_fontweight("bold")


def _group_keys(points: list[Point]) -> list[Line2D]:
    """Legend entries of the groups that occur."""
    occurring = {point.group for point in points}
    shown = [group for key, group in GROUPS.items() if key in occurring]
    return [Line2D([], [], ls="", marker=group.marker, color=group.colour, label=group.text) for group in shown]


def pareto(points: list[Point], path: Path) -> None:
    """Save `pareto_figure`."""
    pareto_figure(points).savefig(path)


def pareto_figure(points: list[Point]) -> Figure:
    """PSNR against measured speed-up of what was timed; only the front, a line, and the reference are named."""
    timed, best = [point for point in points if point.speedup is not None], front(points)
    budgets = sorted({point.budget for point in timed}, reverse=True)
    sizes = dict(zip(budgets, np.linspace(8.5, 5, len(budgets)), strict=True))
    figure = Figure((WIDTH, 5.6))
    axis = figure.subplots()
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    speedups, decibels = np.repeat(_places(best), 2, axis=0).T
    (steps,) = axis.plot(speedups[:-1], decibels[1:], color=GREY, lw=1.5, zorder=1, label="nothing has more of both")
    for point, place in zip(timed, _places(timed), strict=True):
        group, edge = GROUPS[point.group], "black" if point.is_reference else "white"
        look = {"color": group.colour, "ms": sizes[point.budget], "mec": edge, "zorder": 2 + point.is_reference}
        axis.plot(*place, group.marker, mew=0.8, **look)
    axis.set(xlabel="measured speed-up of denoising", ylabel="PSNR against the uncached samples, dB")
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.margins(0.06)
    left, right = axis.get_xlim()
    axis.set_xlim(right=right + 0.1 * (right - left))  # room for the name of the fastest
    figure.legend(handles=_group_keys(timed), loc="outside upper center", ncols=4, handletextpad=0.2)
    keys = [Line2D([], [], ls="", marker="o", color=GREY, ms=sizes[k], label=f"{k} computed steps") for k in budgets]
    legend = axis.legend(handles=[steps, *keys], loc="upper right")
    figure.draw_without_rendering()  # settles the layout: room for names is looked for in pixels
    taken = [legend.get_window_extent(), *_covered(axis, timed, steps)]
    name_points(axis, [point for point in timed if point in best or point.is_reference], taken)
    return figure


def front(points: list[Point]) -> list[Point]:
    """The timed points that no other beats (as good in both PSNR and speed-up, better in one), slowest first."""
    timed = sorted(((p.speedup, p.psnr_db, p) for p in points if p.speedup is not None), key=lambda t: t[:2])
    return [
        point
        for speedup, psnr_db, point in timed
        if not any(s >= speedup and db >= psnr_db and (s, db) != (speedup, psnr_db) for s, db, _ in timed)
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


def decomposition(by_step: dict[str, np.ndarray], growth: dict[int, list[float]], path: Path) -> None:
    """Save `decomposition_figure`."""
    decomposition_figure(by_step, growth).savefig(path)


def decomposition_figure(by_step: dict[str, np.ndarray], growth: dict[int, list[float]]) -> Figure:
    """Each step's share of the final error, stacked by part; below, how much small errors after a step have grown.

    Args:
        by_step: the parts, each (num_steps,).
        growth: for some steps, the factors over prompts and random directions.
    """
    figure = Figure((WIDTH, 5.4))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    colours = dict(zip(by_step, (REUSED, COMPUTED), strict=True))
    above = below = np.zeros(len(next(iter(by_step.values()))))
    for part, shares in by_step.items():
        base = np.where(shares >= 0, above, below)
        top.bar(np.arange(len(shares)), shares, bottom=base, width=0.9, color=colours[part], label=part)
        above, below = above + np.maximum(shares, 0), below + np.minimum(shares, 0)
    top.axhline(0, color=GREY, lw=0.8)
    top.set(ylabel="share of the final error")
    top.legend()
    steps = list(growth)
    least, lower, median, upper, most = growth_quartiles(growth)
    bottom.fill_between(steps, lower, upper, color=COMPUTED, alpha=0.25, lw=0, label="middle half")
    bottom.plot(steps, median, "o-", color=COMPUTED, ms=4, label="median over prompts and directions")
    bottom.plot(steps, most, "v--", color=COMPUTED, ms=3.5, lw=0.8, label="largest")
    bottom.plot(steps, least, "^:", color=COMPUTED, ms=3.5, lw=0.8, label="smallest")
    bottom.axhline(1, color=GREY, lw=0.8, label="neither grown nor shrunk")
    bottom.set(xlabel="step", ylabel="growth until the end", yscale="log")
    bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, columnspacing=1.2, handletextpad=0.5)
    return figure


def growth_quartiles(growth: dict[int, list[float]]) -> np.ndarray:
    """(5, steps): the smallest, lower quartile, median, upper quartile and largest factor of every step."""
    return np.stack([np.percentile(factors, (0, 25, 50, 75, 100)) for factors in growth.values()], axis=1)


def contact_sheet(samples: Path, rows: list[dict[str, Any]], path: Path) -> None:
    """Save `contact_sheet_figure`."""
    contact_sheet_figure(samples, rows).savefig(path)


def contact_sheet_figure(samples: Path, rows: list[dict[str, Any]]) -> Figure:
    """First, middle and last frame of every prompt, or its image: uncached, cached and the amplified difference.

    Differences are those of the files shown: of large clips, which are lossy, they are only nearly the samples'.
    """
    files = [f"{row['index']:03d}.webp" for row in rows[:SHEET_ROWS]]
    arms = [[shown_frames(samples / arm / file) for arm in ("uncached", "cached")] for file in files]
    differences = [difference(uncached, cached) for uncached, cached in arms]
    factor = amplification(differences)
    count, height, width = differences[0].shape
    columns = 4 if width <= SMALL_FRAME_PX else 2
    lines = -(-len(arms) // columns)
    tile = WIDTH / columns / 3 * height / width
    figure = Figure((WIDTH, 0.4 + lines * (0.36 + tile * (3 if count > 1 else 1))))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, row, (uncached, cached), differs in zip(axes, rows, arms, differences, strict=False):
        amplified = np.minimum(differs * factor, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
        axis.imshow(_cell([uncached, cached, amplified]), interpolation="nearest")
        if not differs.any():
            x, y = (0.5, 1 / 6) if count > 1 else (5 / 6, 0.5)  # the middle of the difference
            axis.text(x, y, "identical", transform=axis.transAxes, color="white", fontsize=8, ha="center", va="center")
        axis.set_title(caption(row["prompt"], 156 // columns), fontsize=7, pad=2, parse_math=False)
    order = "first, middle and last frame; from the top" if count > 1 else "from the left"
    figure.suptitle(f"{order}: uncached, cached, and their absolute difference × {factor}", fontsize=9)
    return figure


def caption(prompt: str, width: int, lines: int = 2) -> str:
    """A prompt in few lines; half a surrogate pair, which cannot be drawn, as `\\udXXX`."""
    return textwrap.fill(utf8(prompt).decode(), width, max_lines=lines, placeholder=" …")


def _cell(arms: list[np.ndarray]) -> np.ndarray:
    """Clips (frames, height, width, 3) below each other, a frame beside the next; or images side by side."""
    strips = [np.concatenate(list(frames), axis=1) for frames in arms]
    along = 0 if len(arms[0]) > 1 else 1
    gap = np.full_like(strips[0].take(range(arms[0].shape[2] // 24), axis=along), 255)
    return np.concatenate([strips[0], gap, strips[1], gap, strips[2]], axis=along)


def difference(uncached: np.ndarray, cached: np.ndarray) -> np.ndarray:
    """(frames, height, width): the largest absolute difference of a pixel's three channels, in grey levels."""
    return np.abs(uncached.astype(int) - cached.astype(int)).max(-1)


def amplification(differences: list[np.ndarray]) -> int:
    """The largest of `FACTORS` that leaves 99 % of the pixels that differ unsaturated; 1 if nothing differs."""
    values = np.concatenate([values[values > 0] for values in differences])
    bright = np.quantile(values, 0.99) if len(values) else 255
    return max(factor for factor in FACTORS if factor * bright <= 255)


def shown_frames(path: Path) -> np.ndarray:
    """(frames, height, width, 3) as uint8."""
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        frames = []
        for index in sorted({0, count // 2, count - 1}):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)
