"""The figures of a run."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

SHEET_ROWS = 16
COMPUTED, REUSED, GREY = "#1b4965", "#f4a259", "#8d99ae"


def step_map(record: dict[str, Any], path: Path) -> None:
    """Computed and reused steps along the grid that was integrated."""
    mask, sigmas = np.array(record["steps"]["mask"], bool), np.array(record["sigmas"])
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 3.2), sharex=True, height_ratios=[1, 3], layout="constrained"
    )
    steps = np.arange(len(mask))
    top.bar(steps[mask], 1, width=0.9, color=COMPUTED, label=f"computed ({mask.sum()})")
    if (~mask).any():
        top.bar(steps[~mask], 1, width=0.9, color=REUSED, label=f"reused ({(~mask).sum()})")
    top.set_yticks([])
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    bottom.plot(np.arange(len(sigmas)), sigmas, color=GREY, lw=1)
    bottom.scatter(steps[mask], sigmas[:-1][mask], s=14, color=COMPUTED, zorder=3)
    bottom.scatter(steps[~mask], sigmas[:-1][~mask], s=14, color=REUSED, zorder=3)
    bottom.set(xlabel="step", ylabel="sigma")
    _save(figure, path)


def change_profile(mean: np.ndarray, std: np.ndarray, record: dict[str, Any], path: Path) -> None:
    """Relative L1 change of the residual from one step to the next, with its spread over prompts."""
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    steps = np.arange(len(mean))
    axis.plot(steps, mean, color=COMPUTED, label="mean over calibration prompts and guidance branches")
    axis.fill_between(steps, mean - std, mean + std, color=COMPUTED, alpha=0.2, label="± 1 standard deviation")
    mask = record["steps"]["mask"]
    for step in [k for k, computed in enumerate(mask) if not computed and len(mask) == len(mean)]:
        axis.axvspan(step - 0.5, step + 0.5, color=REUSED, alpha=0.15, lw=0)
    axis.set(xlabel="step i (shaded: reused)", ylabel="‖r[i-1] - r[i]‖₁ / ‖r[i]‖₁", yscale="log")
    axis.legend(frameon=False)
    _save(figure, path)


def psnr_per_prompt(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR of every prompt against its uncached twin; identical clips have none and are marked."""
    figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
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
        axis.legend(frameon=False, loc="lower right")
    axis.set(xlabel="prompt", ylabel="PSNR (dB)", xticks=range(len(rows)))
    _save(figure, path)


def psnr_per_frame(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR by frame, mean over prompts ± 1 standard deviation; identical frames have none and are left out."""
    mean, std, identical = frame_profile(rows)
    figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
    frames = np.arange(len(mean))
    axis.plot(frames, mean, "o-", ms=3, color=COMPUTED, label="mean over prompts")
    axis.fill_between(frames, mean - std, mean + std, color=COMPUTED, alpha=0.2, label="± 1 standard deviation")
    if identical:
        axis.plot([], [], " ", label=f"{identical} identical frames left out")
    axis.set(xlabel="frame", ylabel="PSNR (dB)", xlim=(-0.5, len(mean) - 0.5))
    axis.legend(frameon=False)
    _save(figure, path)


def frame_profile(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean and deviation of PSNR over prompts by frame, (frames,) in dB each, NaN where every clip is identical; and
    how many frames are identical and left out of both."""
    values = np.ma.masked_invalid(np.array([row["frames"]["psnr_db"] for row in rows], float))
    identical = int(np.ma.getmaskarray(values).sum())
    return values.mean(0).filled(np.nan), values.std(0).filled(np.nan), identical


def decomposition(by_step: dict[str, np.ndarray], growth: dict[int, float], path: Path) -> None:
    """Each step's share of the final error, stacked by part; below, how much an error after a step has grown."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=[2, 1], layout="constrained")
    colours = dict(zip(by_step, (REUSED, COMPUTED), strict=True))
    above = below = np.zeros(len(next(iter(by_step.values()))))
    for part, shares in by_step.items():
        base = np.where(shares >= 0, above, below)
        top.bar(np.arange(len(shares)), shares, bottom=base, width=0.9, color=colours[part], label=part)
        above, below = above + np.maximum(shares, 0), below + np.minimum(shares, 0)
    top.axhline(0, color=GREY, lw=0.8)
    top.set(ylabel="share of the final error")
    top.legend(frameon=False)
    bottom.plot(list(growth), list(growth.values()), "o-", color=COMPUTED, ms=4)
    bottom.set(xlabel="step", ylabel="growth until the end", yscale="log")
    _save(figure, path)


def contact_sheet(samples: Path, rows: list[dict[str, Any]], path: Path) -> None:
    """First, middle and last frame of every prompt, or its image, uncached to the left of cached, with the prompt."""
    pairs = []
    for row in rows[:SHEET_ROWS]:
        arms = [_shown_frames(samples / arm / f"{row['index']:03d}.webp") for arm in ("uncached", "cached")]
        gap = np.full((arms[0].shape[0], arms[0].shape[1] // 24, 3), 255, np.uint8)
        pairs.append(np.concatenate([arms[0], gap, arms[1]], axis=1))
    moving = pairs[0].shape[1] > 3 * pairs[0].shape[0]
    columns, width, height, letters = (2, 6.4, 1.32, 88) if moving else (4, 3.2, 1.85, 100)
    lines = -(-len(pairs) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines + 0.4), layout="tight", squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row, pair in zip(axes.flat, rows, pairs, strict=False):
        axis.imshow(pair, interpolation="nearest")
        title = textwrap.shorten(row["prompt"], letters, placeholder=" …")
        axis.set_title(title if moving else textwrap.fill(title, 50), fontsize=7.5, pad=2)
    shown = ": first, middle and last frame" if moving else ""
    figure.suptitle(f"uncached (left) and cached (right){shown}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown_frames(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        frames = []
        for index in sorted({0, count // 2, count - 1}):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.concatenate(frames, axis=1)


def _save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def pareto(points: list[dict[str, Any]], axis: str, label: str, path: Path) -> None:
    """PSNR of every method over `axis`, a panel for each budget; nothing beats the points on the grey line."""
    known = [p for p in points if None not in (p["psnr_db"], p[axis], p["computed"])]
    budgets = sorted({p["computed"] for p in known}, reverse=True)
    figure, panels = plt.subplots(
        1, max(1, len(budgets)), figsize=(7 * max(1, len(budgets)), 7.5), squeeze=False, layout="constrained"
    )
    for panel, budget in zip(panels[0], budgets, strict=False):
        here = sorted((p for p in known if p["computed"] == budget), key=lambda p: p["psnr_db"])
        front: list[dict[str, Any]] = []
        for p in sorted(here, key=lambda p: ((1 if axis == "forwards" else -1) * p[axis], -p["psnr_db"])):
            if not front or p["psnr_db"] > front[-1]["psnr_db"]:
                front.append(p)
        panel.plot([p[axis] for p in front], [p["psnr_db"] for p in front], color=GREY, lw=3, alpha=0.4, zorder=0)
        colours = [_kind_colour(p["method"]) for p in here]
        panel.scatter([p[axis] for p in here], [p["psnr_db"] for p in here], c=colours, s=28, zorder=3)
        low, high = panel.get_ylim()
        apart = min(0.032, 1 / max(1, len(here) - 1))  # of the panel's height: closer where there are many
        heights = _spread([(p["psnr_db"] - low) / (high - low) for p in here], apart)
        for p, colour, height in zip(here, colours, heights, strict=True):
            panel.annotate(
                p["method"],
                (p[axis], p["psnr_db"]),
                xytext=(1.04, height),
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.5},
            )
        panel.set(title=f"{budget} computed steps", xlabel=label)
    panels[0, 0].set_ylabel("PSNR against the uncached samples, dB")
    _save(figure, path)


def _kind_colour(method: str) -> str:
    """One colour for what caches nothing, one for the paper's method and its parts, one for the others."""
    if method.startswith(("fewer_steps", "plan_grid")):
        return REUSED
    return "#c1121f" if method in ("ertacache", "policy", "policy_time") else COMPUTED


def _spread(heights: list[float], apart: float) -> list[float]:
    """Rising heights moved as little as it takes to keep them apart, and inside 0 … 1 if they fit."""
    made = list(heights)
    for k in range(1, len(made)):
        made[k] = max(made[k], made[k - 1] + apart)
    ceiling = max(1.0, apart * (len(made) - 1))
    for k in reversed(range(len(made))):
        made[k] = min(made[k], ceiling - apart * (len(made) - 1 - k))
    return made
