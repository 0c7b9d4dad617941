"""The figures of a run, of a comparison and of an error's decomposition.

Every figure is made for a page of about 900 px: `WIDTH` inches are shown on it, so a point of type is 1.4 px. Colours
are those of Okabe and Ito (2008), told apart in every kind of colour blindness; groups also have a marker of their own.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from analysis.records import utf8
from analysis.style import COMPUTED, GREY, REUSED, WIDTH

SHEET_ROWS = 16
SMALL_FRAME_PX = 200  # wide; a row of a sheet shows twice as many of them
FACTORS = (1, 2, 5, 10, 20, 50)  # of a difference


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
