"""Figures of linear solvers: what each method is as one, and where a fitted one breaks."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.intervals import paired_interval
from analysis.style import COMPUTED, GREY, REUSED, WIDTH, look

SHOWN_LAGS = 4  # of a solver's memory


def solver_tables(series: dict[str, Any]) -> Figure:
    """Methods as linear solvers, one below the other: weights of outputs, as shares of the step, and of earlier latents.

    A method on a grid of its own stands at the same noise levels of the finest one's.
    """
    solvers = series["solvers"]
    finest = max(solvers.values(), key=lambda solver: solver["nodes"][-1])
    figure = Figure((WIDTH, 0.9 + 1.15 * len(solvers)))
    axes = figure.subplots(len(solvers), 2, sharex=True, squeeze=False)
    for row, (title, solver) in zip(axes, solvers.items(), strict=True):
        nodes = np.interp(-np.array(solver["sigmas"][:-1]), -np.array(finest["sigmas"][:-1]), finest["nodes"])
        lengths = np.diff(solver["sigmas"])[:, None]
        for axis, table, name in zip(
            row, (solver["velocity"] / lengths, np.array(solver["latent"])), "vx", strict=True
        ):
            _weights(axis, nodes, table, name)
        row[0].set_title(title, fontsize=8, loc="left", pad=2)
    axes[-1, 0].set_xlabel("step; weights of outputs / length of the step")
    axes[-1, 1].set_xlabel("step; weights of latents in x[k+1] − x[k]")
    widest = max(range(len(solvers)), key=lambda place: len(axes[place, 0].lines))
    outputs, latents = (axis.get_legend_handles_labels()[0] for axis in axes[widest])
    figure.legend(handles=outputs, loc="outside upper left", ncols=SHOWN_LAGS, fontsize=7)
    figure.legend(handles=latents, loc="outside upper right", ncols=SHOWN_LAGS, fontsize=7)
    return figure


def _weights(axis: Axes, nodes: np.ndarray, table: np.ndarray, name: str) -> None:
    """A line for each of the last nodes that is used; ticks at the bottom are the nodes."""
    axis.axhline(0, color=GREY, lw=0.5)
    for lag in range(min(table.shape[1], SHOWN_LAGS)):
        used = np.abs(table[:, lag]) > 1e-9
        label = f"{name}[k]" if lag == 0 else f"{name}[k − {lag}]"
        line: dict[str, Any] = {"ms": 3, "lw": 0.8, "label": label, **look(lag)}
        axis.plot(nodes[used], table[used, lag], **line)
    axis.vlines(nodes, 0, 0.06, color="black", lw=0.6, transform=axis.get_xaxis_transform())
    reach = 1.2 * max(np.abs(table[:, :SHOWN_LAGS]).max(), 0.1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(-reach, reach)
    place = 1 if reach < 10 else 10 if reach < 100 else 100
    ticks = [-place, 0, place] if reach > 1 else [-0.1, 0, 0.1]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(labelsize=6)


def solver_limits(series: dict[str, Any]) -> Figure:
    """PSNR under every condition, by prompt, beside a solver fitted for what it runs on; and what the condition costs."""
    conditions = series["conditions"]
    figure = Figure((WIDTH, 1.2 + 0.34 * len(conditions)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for row, one in enumerate(conditions.values()):
        for values, colour, up in ((one["matched"], GREY, 0.16), (one["psnr_db"], COMPUTED, -0.16)):
            left.plot(values, [row + up] * len(values), "o", color=colour, ms=3, alpha=0.5)
            left.plot([np.median(values)] * 2, [row + up - 0.14, row + up + 0.14], color=colour, lw=2)
        loss = paired_interval(np.array(one["psnr_db"]) - np.array(one["matched"]))
        colour = REUSED if loss.high < 0 else COMPUTED if loss.low > 0 else GREY
        right.errorbar(
            loss.mean, row, xerr=[[loss.mean - loss.low], [loss.high - loss.mean]], fmt="o", ms=4, color=colour
        )
        right.text(1.02, row, f"{loss.mean:+.1f}", transform=right.get_yaxis_transform(), va="center", fontsize=7)
    left.set_yticks(range(len(conditions)), list(conditions), fontsize=7.5)
    left.set(ylim=(len(conditions) - 0.5, -0.5), xlabel="PSNR to uncached, dB (grey: fitted for it)")
    right.axvline(0, color="black", ls=":", lw=1)
    right.set_xlabel("difference, dB, 95 % interval over prompts")
    for axis in (left, right):
        axis.grid(axis="y", color=GREY, alpha=0.2, lw=0.5)
    return figure
