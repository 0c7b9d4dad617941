"""The paper's figures, each drawn from a finished run alone: by the names that tables and figure records give."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots, row_plots, solver_figures, worst
from analysis.comparison import Comparison, Outcome, as_point
from analysis.intervals import paired_interval
from analysis.records import UNCACHED, FigureRecord, Rows
from analysis.style import COMPUTED, GREY, REUSED, WIDTH, look, save, strip

SAMPLES = "samples"  # folder of a run
SHOWN_PROMPTS = 4  # of a side-by-side sheet
CHARACTERS_AN_INCH = 17  # of its small type
Named = Iterator[tuple[str, Figure]]


def of_rows(rows: Rows, folder: Path) -> list[Path]:
    """Every figure that a table asks for, in `folder`/figures as PNG and PDF; the PNG files that were written."""
    made = []
    for name in rows.record.table.figures:
        for stem, figure in OF_ROWS[name](rows, folder):
            made.append(_saved(figure, folder, stem))
    return made


def of_figure(record: FigureRecord, folder: Path) -> list[Path]:
    """The figure of a figure record, in `folder`/figures as PNG and PDF; the PNG file that was written."""
    return [_saved(OF_FIGURES[record.experiment](record.series), folder, record.experiment)]


def _saved(figure: Figure, folder: Path, stem: str) -> Path:
    (folder / "figures").mkdir(exist_ok=True)
    return save(figure, folder / "figures" / stem)[0]


def points(comparison: Comparison) -> list[row_plots.Point]:
    """The rows of a table that have a budget and a PSNR."""
    found = [as_point(one, comparison) for one in comparison.outcomes]
    return [row_plots.Point(**point) for point in found if point is not None]


def slug(key: str) -> str:
    """A row's key as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", key).strip("_")


def methods(rows: Rows, folder: Path) -> Named:
    """Every method's PSNR with its interval, and PSNR against measured speed-up where that was measured."""
    if found := points(Comparison(rows)):
        yield "methods", row_plots.dot_plot_figure(found, rows.record.num_steps)
    if len(row_plots.timed(found)) > 1:
        yield "pareto", row_plots.pareto_figure(found)


def budget_curves(rows: Rows, folder: Path) -> Named:
    """PSNR against the share of steps that are computed: a line a method, its band the 95 % interval over prompts."""
    comparison = Comparison(rows)
    full = comparison.full_forwards
    lines: dict[str, list[tuple[float, Outcome]]] = {}
    for one in comparison.outcomes:
        if one.samples and one.row.computed is not None and not one.reused_nothing(full):
            lines.setdefault(one.row.title, []).append((one.row.computed / rows.record.num_steps, one))
    figure = Figure((WIDTH, 4.2))
    axis = figure.subplots()
    for place, (title, found) in enumerate(lines.items()):
        _curve(axis, found, {**look(place), "label": title}, band=place == 0)
    axis.set(xlabel="share of the steps that are computed", ylabel="PSNR against the uncached samples, dB")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside upper center", ncols=4)
    if lines:
        yield "budget_curves", figure


def calibration_size(rows: Rows, folder: Path) -> Named:
    """PSNR against the number of calibration prompts, its band the 95 % interval over test prompts."""
    found = _swept(rows, "calibration.num_prompts")
    figure = Figure((WIDTH, 3.2))
    axis = figure.subplots()
    _curve(axis, found, {**look(0), "label": "mean over test prompts, 95 % interval"}, band=True)
    axis.set_xscale("log", base=2)
    axis.set_xticks([value for value, _ in found], [f"{value:g}" for value, _ in found])
    axis.minorticks_off()
    axis.set(xlabel="calibration prompts", ylabel="PSNR against the uncached samples, dB")
    axis.legend()
    if found:
        yield "calibration_size", figure


def threshold_sensitivity(rows: Rows, folder: Path) -> Named:
    """PSNR and the share of forwards that are made, against the threshold."""
    found, full = _swept(rows, "cache.threshold"), Comparison(rows).full_forwards
    figure = Figure((WIDTH, 4.4))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _curve(top, found, {**look(0), "label": "mean over prompts, 95 % interval"}, band=True)
    top.set(ylabel="PSNR against the\nuncached samples, dB")
    top.legend()
    thresholds = [value for value, _ in found]
    bottom.plot(thresholds, [one.forwards / (full or np.nan) for _, one in found], **look(1), ms=5)
    bottom.set(xlabel="threshold λ", ylabel="forwards made", xscale="log", ylim=(0, 1.05))
    bottom.set_xticks(thresholds, [f"{value:g}" for value in thresholds])
    bottom.minorticks_off()
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if found:
        yield "threshold_sensitivity", figure


def _swept(rows: Rows, key: str) -> list[tuple[float, Outcome]]:
    """The rows that set a key to a number, smallest first; those whose samples are identical have no PSNR to show."""
    found = []
    for one in Comparison(rows).outcomes:
        values = [override.partition("=")[2] for override in one.row.overrides if override.startswith(f"{key}=")]
        if values and one.samples and one.interval("psnr_db") is not None:
            found.append((float(values[0]), one))
    return sorted(found, key=lambda pair: pair[0])


def _curve(axis: Axes, found: list[tuple[float, Outcome]], line: dict[str, Any], band: bool) -> None:
    known = [
        (value, interval) for value, one in sorted(found, key=lambda p: p[0]) if (interval := one.interval("psnr_db"))
    ]
    values = [value for value, _ in known]
    axis.grid(color=GREY, alpha=0.25, lw=0.5)
    axis.plot(values, [interval.mean for _, interval in known], ms=5, lw=1.5, **line)
    if band:
        low, high = [interval.low for _, interval in known], [interval.high for _, interval in known]
        axis.fill_between(values, low, high, color=line["color"], alpha=0.18, lw=0)


def side_by_side(rows: Rows, folder: Path) -> Named:
    """The same prompts down the page, the rows of the table across, with the difference to the uncached sample below.

    Drawn where the samples lie; from rows alone nothing is shown.
    """
    comparison, samples = Comparison(rows), folder / SAMPLES
    shown = [one for one in comparison.outcomes if one.samples and (samples / slug(one.row.key)).is_dir()]
    count = len(sorted((samples / UNCACHED).glob("*.webp"))[:SHOWN_PROMPTS]) if shown else 0
    if not count:
        return
    files = [f"{index:03d}.webp" for index in range(count)]
    uncached = [plots.shown_frames(samples / UNCACHED / file) for file in files]
    made = [[plots.shown_frames(samples / slug(one.row.key) / file) for file in files] for one in shown]
    differences = [[plots.difference(a, b) for a, b in zip(uncached, row, strict=True)] for row in made]
    factor = plots.amplification([one for row in differences for one in row])
    frames, height, width = differences[0][0].shape
    cell = WIDTH / (len(shown) + 1)
    figure = Figure((WIDTH, 0.5 + count * (0.2 + 2 * cell * height / (width * frames))))
    axes = figure.subplots(count, len(shown) + 1, squeeze=False)
    for place, prompt in enumerate(rows.record.prompts[:count]):
        first = axes[place, 0]
        _cell(first, uncached[place], np.full_like(uncached[place], 255), "uncached" if place == 0 else "")
        text = plots.caption(prompt, int(cell * CHARACTERS_AN_INCH), 3 if frames > 1 else 5)
        place_of_it = {"transform": first.transAxes, "ha": "center", "va": "center"}
        first.text(0.5, 0.25, text, fontsize=7, parse_math=False, **place_of_it)
        for column, one in enumerate(shown, 1):
            grey = np.minimum(differences[column - 1][place] * factor, 255).astype(np.uint8)
            psnr = one.samples[place].psnr_db
            title = f"{one.row.title}: " if place == 0 else ""
            title += "identical" if psnr is None else f"{psnr:.1f} dB"
            _cell(axes[place, column], made[column - 1][place], grey[..., None].repeat(3, -1), title)
    figure.suptitle(f"left: uncached; below each sample its absolute difference to it × {factor}", fontsize=9)
    yield "side_by_side", figure


def worst_samples(rows: Rows, folder: Path) -> Named:
    """The worst prompts of each row whose worst samples are kept, the uncached sample beside the row's."""
    for one in Comparison(rows).outcomes:
        kept = folder / worst.FOLDER / slug(one.row.key)
        if one.samples and kept.is_dir():
            ranked = worst.worst(one, rows.record.prompts, len(one.samples))
            here = list(takewhile(lambda bad, at=kept: all(map(Path.is_file, bad.files(at))), ranked))  # type: ignore[misc]
            if here:
                yield f"worst_{slug(one.row.key)}", worst.worst_figure(one.row.title, here, kept)


def _cell(axis: Axes, frames: np.ndarray, below: np.ndarray, title: str) -> None:
    strips = [np.concatenate(list(part), axis=1) for part in (frames, below)]
    axis.imshow(np.concatenate(strips, axis=0), interpolation="nearest")
    axis.set_title(title, fontsize=7, pad=2)
    axis.set_axis_off()


def _band(axis: Axes, steps: np.ndarray, quantiles: np.ndarray, place: int, label: str) -> None:
    """A line by step between two others: (3, steps), low to high."""
    low, middle, high = quantiles
    line = look(place)
    axis.plot(steps, middle, color=line["color"], ls=line["ls"], label=label)
    axis.fill_between(steps, low, high, color=line["color"], alpha=0.2, lw=0)


def realism(series: dict[str, Any]) -> Figure:
    """What fewer steps cost, how small errors grow, and the printed order of methods against ours: a dot a prompt."""
    figure = Figure((WIDTH, 7.2))
    grid = figure.add_gridspec(2, 2, height_ratios=[2, 3])
    left, right, below = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    for place, (name, values) in enumerate(series["fewer"].items()):
        strip(left, place, values, look(place)["color"], name)
    printed = series.get("printed_fewer")
    if printed:
        left.axhline(printed["psnr_db"], color="black", ls=":", lw=1)
        left.text(1.4, printed["psnr_db"], f"printed, {printed['speedup']:g}x", fontsize=7, va="bottom", ha="right")
    left.set_xticks(range(len(series["fewer"])), [f"{name} of the steps" for name in series["fewer"]])
    left.set(ylabel="PSNR, dB", title="fewer steps", xlim=(-0.6, len(series["fewer"]) - 0.4))
    for place, (kind, label) in enumerate((("random", "random"), ("along", "along the trajectory"))):
        for at, values in enumerate(series["growth"][kind].values()):
            strip(right, at + 0.3 * place - 0.15, values, look(place)["color"], label if at == 0 else None)
    right.axhline(1, color="black", ls=":", lw=1)
    right.set_xticks(range(4), list(series["growth"]["random"]))
    right.set(yscale="log", title="growth of a small error", xlabel="put in at this share of the steps")
    right.legend(fontsize=7)
    for place, (level, rows) in enumerate(series["order"].items()):
        line = look(place)
        printed_db, ours = [row["printed"] for row in rows.values()], [np.mean(row["psnr_db"]) for row in rows.values()]
        below.plot(printed_db, ours, line["marker"], color=line["color"], label=level)
        for (title, row), mean in zip(rows.items(), ours, strict=True):
            below.annotate(title, (row["printed"], mean), fontsize=7, xytext=(4, 3), textcoords="offset points")
    below.set(xlabel="PSNR as printed, dB (the paper's model)", ylabel="PSNR here, dB", title="order of methods")
    below.legend(fontsize=7)
    return figure


def regimes(series: dict[str, Any]) -> Figure:
    """Conclusions by regime: a row each, a cell a guidance and budget; filled where the interval decides."""
    cells = series["cells"]
    names = list(dict.fromkeys(cell for found in cells.values() for cell in found))
    figure = Figure((WIDTH, 1.6 + 0.24 * len(cells)))
    axis = figure.subplots()
    for row, found in enumerate(cells.values()):
        for cell, values in found.items():
            gain = paired_interval(np.array(values))
            decided = gain.low > 0 or gain.high < 0
            colour = COMPUTED if gain.mean > 0 else REUSED
            place = names.index(cell)
            axis.barh(row, 0.94, left=place - 0.47, height=0.9, color=colour, alpha=0.75 if decided else 0.15)
            axis.text(place, row, f"{gain.mean:+.1f}", ha="center", va="center", fontsize=6.5)
    axis.set_yticks(range(len(cells)), list(cells), fontsize=7.5)
    axis.set_xticks(
        range(len(names)), [name.replace("true ", "true\n").replace(", ", "\n") for name in names], fontsize=7
    )
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.set(ylim=(len(cells) - 0.5, -0.5), xlim=(-0.5, len(names) - 0.5))
    axis.set_xlabel("mean paired difference in dB; full colour: the 95 % interval is on one side of zero")
    return figure


def fig2a_error_profile(series: dict[str, Any]) -> Figure:
    """Relative L1 change by step: true, as TeaCache predicts it, and as a profile of other prompts does; below, each prompt."""
    true, predicted = (np.array(series[name], float) for name in ("true", "predicted"))
    profile, steps = np.array(series["profile"], float), np.arange(1, len(series["profile"]) + 1)
    figure = Figure((WIDTH, 5.2))
    top, bottom = figure.subplots(2, 1, sharex=True)
    for place, (values, label) in enumerate(((true, "true"), (predicted, "predicted by TeaCache"))):
        _band(top, steps, np.quantile(values, (0.05, 0.5, 0.95), axis=0), place, f"{label}: median over prompts")
    top.plot(steps, profile, color="black", ls=":", label="mean over calibration prompts")
    top.set(yscale="log", ylabel="relative L1 change\n(bands: 90 % of prompts)")
    top.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    bottom.plot(steps, true.T, color=COMPUTED, alpha=0.25, lw=0.8)
    bottom.plot(steps, profile, color="black", ls=":")
    bottom.set(yscale="log", xlabel="step", ylabel="true, a line a prompt")
    return figure


def fig2b_trajectory_drift(series: dict[str, Any]) -> Figure:
    """Distance to the uncached trajectory by step, at the same sigma; a line an arm, its band the middle half of the prompts."""
    figure = Figure((WIDTH, 3.8))
    axis = figure.subplots()
    for place, (name, values) in enumerate(series["drift"].items()):
        drift = np.array(values, float)
        _band(axis, np.arange(1, drift.shape[1] + 1), np.quantile(drift, (0.25, 0.5, 0.75), axis=0), place, name)
    axis.set(xlabel="step", ylabel="‖xc − x‖ / ‖x‖ at the same sigma", yscale="log")
    axis.legend()
    return figure


def fig6_channel_errors(series: dict[str, Any]) -> Figure:
    """Mean absolute error of reused outputs by latent channel, over its mean: a box of prompts a channel, static and dynamic."""
    figure = Figure((WIDTH, 3.8))
    axis = figure.subplots()
    groups = {"static": (REUSED, -0.2, "//"), "dynamic": (COMPUTED, 0.2, "")}
    for name, (colour, shift, hatch) in groups.items():
        values = np.array(series[name], float)
        shares = values / values.mean(1, keepdims=True)
        places = np.arange(shares.shape[1]) + shift
        boxes = axis.boxplot(
            shares,
            positions=places,
            widths=0.34,
            patch_artist=True,
            medianprops={"color": "black"},
            flierprops={"ms": 3},
        )
        for box in boxes["boxes"]:
            box.set(facecolor=colour, alpha=0.75, hatch=hatch)
        axis.bar(0, 0, color=colour, alpha=0.75, hatch=hatch, label=f"{name} half of the prompts ({len(values)})")
    channels = np.array(series["static"]).shape[1]
    axis.set(xlabel="latent channel", ylabel="error, over its mean over channels")
    named = range(0, channels, max(1, channels // 16))
    axis.set_xticks(named, [f"{channel}" for channel in named])
    axis.legend(ncols=2)
    return figure


def long_video(series: dict[str, Any]) -> Figure:
    """Measured speed-up by size, a dot a prompt, beside what as many forwards can reach."""
    figure = Figure((WIDTH, 3.6))
    axis = figure.subplots()
    for place, size in enumerate(series["sizes"]):
        measured = np.array(size["speedups"], float)
        spread = np.linspace(-0.12, 0.12, len(measured)) if len(measured) > 1 else np.zeros(1)
        axis.plot(
            place + spread,
            measured,
            "o",
            ms=4,
            color=COMPUTED,
            alpha=0.7,
            label=None if place else "measured, a dot a pair",
        )
        axis.plot(
            [place - 0.25, place + 0.25],
            [size["possible"]] * 2,
            color="black",
            label=None if place else "possible with these forwards",
        )
    axis.set_xticks(
        range(len(series["sizes"])), [f"{s['frames']} × {s['height']} × {s['width']}" for s in series["sizes"]]
    )
    axis.set(xlabel="frames × height × width", ylabel="speed-up of denoising")
    axis.yaxis.set_major_formatter("{x:g}×")
    axis.legend()
    return figure


OF_ROWS: dict[str, Callable[[Rows, Path], Named]] = {
    one.__name__: one
    for one in (methods, budget_curves, calibration_size, threshold_sensitivity, side_by_side, worst_samples)
}
OF_FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    one.__name__: one
    for one in (
        solver_figures.solver_tables,
        solver_figures.solver_limits,
        realism,
        regimes,
        fig2a_error_profile,
        fig2b_trajectory_drift,
        fig6_channel_errors,
        long_video,
    )
}
