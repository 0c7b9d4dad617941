"""Figures over several runs, from the frame of `analysis.runs`: each as PNG and PDF, one function a figure.

The style is that of `analysis.style`. What differs in colour differs in marker, line or hatching too, so that it can be told apart
in grey.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.row_plots import GROUPS, Point, dot_plot_figure, pareto_figure, timed
from analysis.style import COLOURS, COMPUTED, DASHES, GREY, MARKERS, REUSED, WIDTH, save

REFERENCE = "ertacache"
NAMED = 7  # lines with a colour and a name; the others are grey
MOST_PANELS, MOST_TICKS = 6, 12
PARTS = {"injected": (REUSED, ""), "propagated": (COMPUTED, "///"), "grid": (GREY, "...")}


@dataclass(frozen=True)
class Split:
    """The error of one run as the comparison shows it: shares of the final error, in sum and by step where that is known."""

    title: str
    shares: dict[str, float]
    by_step: dict[str, list[float]] = field(default_factory=dict)
    mask: list[int] | None = None


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Every figure for which the frame holds something, in `folder`; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, figure in figures(frame) for path in save(figure, folder / name)]


def figures(frame: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Name and figure, those of PSNR once a model."""
    for model, here in frame.dropna(subset=["model"]).groupby("model", sort=True):
        name = re.sub(r"\W+", "_", str(model))
        found = points(here)
        steps = int(here["steps"].dropna().mode().max()) if here["steps"].notna().any() else 0
        if found:
            yield f"psnr_by_budget_{name}", psnr_by_budget_figure(found, steps)
            if len({point.budget for point in found}) <= MOST_PANELS:
                yield f"methods_{name}", dot_plot_figure(found, steps)
        if len(timed(found)) > 1:
            yield f"pareto_{name}", pareto_figure(found)
    measured = frame.dropna(subset=["speedup_denoise", "speedup_possible"])
    if len(measured):
        yield "speedup", speedup_figure(measured)
    split = frame.dropna(subset=list(PARTS))
    if len(split):
        shares = [Split(_split_title(row), {part: row[part] for part in PARTS}) for _, row in split.iterrows()]
        yield "decompositions", decompositions_figure(shares)


def points(frame: pd.DataFrame) -> list[Point]:
    """Rows with a budget and a PSNR, as the figures show them; what reused nothing is left out."""
    known = frame.dropna(subset=["psnr_db", "computed"])
    known = known[known["computed"] <= known["steps"]]
    sites = known["site"].dropna().nunique() > 1
    made = []
    for _, row in known.iterrows():
        where = f", {row['site']}" if sites and isinstance(row["site"], str) else ""
        low, high = (row[key] if pd.notna(row[key]) else row["psnr_db"] for key in ("psnr_low", "psnr_high"))
        made.append(
            Point(
                title=_name(row) + where,
                group=row["group"] if row["group"] in GROUPS else "planned",
                budget=int(row["computed"]),
                psnr_db=row["psnr_db"],
                low=low,
                high=high,
                speedup=row["speedup_denoise"] if pd.notna(row["speedup_denoise"]) else None,
                is_reference=_name(row) == "ERTACache" or row["title"] == REFERENCE,
            )
        )
    return made


def _name(row: Any) -> str:
    """For people, if the record knows such a name."""
    return str(row["title"] if isinstance(row["title"], str) else row["cache"])


def _split_title(row: Any) -> str:
    steps = f"\n{int(row['computed'])} of {int(row['steps'])} steps" if pd.notna(row["computed"]) else f"\n{row['run']}"
    return f"{_name(row)}{steps}"


def psnr_by_budget_figure(found: list[Point], num_steps: int) -> Figure:
    """PSNR with its 95 % interval against the number of computed steps, a line a method.

    The reference and the best of those that were run at every budget have a colour, a marker and a name, `NAMED` in all; the
    others are thin and grey. Several runs of a method at one budget are dots, and the line goes through their mean.
    """
    lines: dict[str, list[Point]] = {}
    for point in found:
        lines.setdefault(point.title, []).append(point)
    mean = {title: _line(here)[1][-1] for title, here in lines.items()}  # at its largest budget
    reference = {point.title for point in found if point.is_reference}
    widest = max(len({point.budget for point in here}) for here in lines.values())
    whole = {title for title, here in lines.items() if len({point.budget for point in here}) == widest}
    order = sorted(lines, key=lambda title: (title not in reference, title not in whole, -mean[title]))
    named = sorted(order[:NAMED], key=lambda title: -mean[title])
    figure = Figure((WIDTH, 4.6))
    axis = figure.subplots()
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    for title in order[NAMED:]:
        axis.plot(*_line(lines[title]), ".-", color=GREY, lw=0.8, ms=3.5, alpha=0.7, zorder=1)
    looks = dict(
        zip(order, zip(COLOURS, MARKERS, itertools.cycle(DASHES), strict=False), strict=False)
    )  # the reference first
    for rank, title in enumerate(named):
        (colour, marker, style), here, bold = looks[title], lines[title], title in reference
        shift = (rank - (len(named) - 1) / 2) * 0.004 * num_steps  # intervals stand next to each other
        budgets, decibels = _line(here)
        axis.plot(budgets + shift, decibels, style, color=colour, lw=2.4 if bold else 1.4, zorder=2 + bold)
        places = np.array([point.budget for point in here]) + shift
        values = np.array([point.psnr_db for point in here])
        reach = [values - [point.low for point in here], [point.high for point in here] - values]
        look: dict[str, Any] = {
            "color": colour,
            "ms": 7 if bold else 5,
            "mec": "black" if bold else "white",
            "mew": 0.7,
        }
        axis.errorbar(places, values, reach, fmt=marker, elinewidth=1, capsize=2, zorder=3 + bold, **look)
        axis.plot([], [], marker + style, label=title, **look)
    if len(order) > NAMED:
        axis.plot([], [], ".-", color=GREY, lw=0.8, ms=3.5, label=f"{len(order) - NAMED} more methods")
    axis.set(xlabel=f"computed steps of {num_steps}", ylabel="PSNR against the uncached samples, dB")
    budgets_of_all = sorted({point.budget for point in found})
    if len(budgets_of_all) <= MOST_TICKS:
        axis.set_xticks(budgets_of_all)
    axis.margins(x=0.05)
    figure.legend(loc="outside right upper", handlelength=3.2)
    return figure


def _line(here: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Budgets in order, and the mean PSNR at each."""
    budgets = sorted({point.budget for point in here})
    return np.array(budgets), np.array([np.mean([p.psnr_db for p in here if p.budget == k]) for k in budgets])


def speedup_figure(frame: pd.DataFrame) -> Figure:
    """Measured against possible speed-up, a point a run; on the line, all that as many forwards can give was reached."""
    figure = Figure((WIDTH, 4.6))
    axis = figure.subplots()
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    highest = 1.05 * float(frame[["speedup_denoise", "speedup_possible"]].to_numpy(float).max())
    axis.plot([1, highest], [1, highest], color=GREY, lw=1, label="all of it")
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    names = frame["model"].astype(str) + ", " + [_name(row) for _, row in frame.iterrows()]
    for name, (colour, marker) in zip(dict.fromkeys(names), looks, strict=False):
        here = frame[names == name]
        axis.plot(
            here["speedup_possible"],
            here["speedup_denoise"],
            marker,
            color=colour,
            ms=6,
            mec="white",
            mew=0.6,
            label=name,
        )
    axis.set(xlabel="possible with as many forwards", ylabel="measured speed-up of denoising")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter("{x:g}×")
    figure.legend(loc="outside right upper")
    return figure


def decompositions_figure(splits: list[Split]) -> Figure:
    """Where the final errors of several runs come from: a row a run, in sum on the left and by step on the right."""
    by_step = any(one.by_step for one in splits)
    figure = Figure((WIDTH, 1.0 + (0.85 if by_step else 0.5) * len(splits)))
    grid = figure.subplots(
        len(splits), 1 + by_step, squeeze=False, sharex="col", width_ratios=[2, 5] if by_step else [1]
    )
    for (left, *right), one in zip(grid, splits, strict=True):
        _sum(left, one)
        for axis in right:
            _steps(axis, one)
    grid[-1][0].set_xlabel("share of the final error, in sum")
    grid[-1][0].xaxis.set_major_locator(MaxNLocator(4))
    grid[-1][0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if by_step:
        grid[-1][1].set_xlabel("step (shaded: reused); its share of the final error")
    keys = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=part) for part, (colour, hatch) in PARTS.items()
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=3)
    return figure


def _sum(axis: Axes, one: Split) -> None:
    """Bars of the three parts, each with its number; they sum to 1."""
    for place, (part, (colour, hatch)) in enumerate(PARTS.items()):
        share = one.shares[part]
        axis.barh(place, share, 0.8, color=colour, hatch=hatch, edgecolor="white", lw=0)
        axis.annotate(
            f"{share:+.0%}", (share, place), (3 if share >= 0 else -3, 0), textcoords="offset points",
            ha="left" if share >= 0 else "right", va="center", fontsize=7.5,
        )  # fmt: skip
    axis.axvline(0, color=GREY, lw=0.8)
    axis.set_yticks([1], [one.title])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.invert_yaxis()
    axis.margins(x=0.28)


def _steps(axis: Axes, one: Split) -> None:
    """Each step's share, stacked by part; reused steps are shaded."""
    count = len(next(iter(one.by_step.values()), []))
    for step in [k for k, computed in enumerate(one.mask or []) if not computed]:
        axis.axvspan(step - 0.5, step + 0.5, color=GREY, alpha=0.18, lw=0)
    above = below = np.zeros(count)
    for part, shares in one.by_step.items():
        colour, hatch = PARTS[part]
        values = np.array(shares)
        axis.bar(
            np.arange(count),
            values,
            0.9,
            np.where(values >= 0, above, below),
            color=colour,
            hatch=hatch,
            ec="white",
            lw=0,
        )
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    axis.axhline(0, color=GREY, lw=0.8)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if abs(value) < 0.01 else f"{value:.0%}")
