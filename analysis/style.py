"""What all figures have in common: sizes and colours, how lines are told apart, in grey too, and how a figure is written."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0
COMPUTED, REUSED, GREY, BAND = "#0072B2", "#E69F00", "#8d99ae", "#F6EFC4"
# Okabe and Ito (2008), without the yellow that a white page swallows
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#333333", "#56B4E9", "#D55E00")
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
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
        "pdf.fonttype": 42,  # text stays text
    }
)


def look(place: int) -> dict[str, str]:
    """Colour, dashes and marker of the line at a place, for matplotlib."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "ls": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
    }


def strip(axis: Axes, place: float, values: list[float], colour: str, label: str | None = None) -> None:
    """A column of dots, one a value, and their median as a bar."""
    axis.plot([place] * len(values), values, "o", color=colour, ms=3, alpha=0.6, label=label)
    axis.plot([place - 0.12, place + 0.12], [np.median(values)] * 2, color=colour, lw=2)


def save(figure: Figure, path: Path) -> list[Path]:
    """As PNG and PDF, `path` without a suffix; the files."""
    made = [path.with_name(f"{path.name}.{form}") for form in ("png", "pdf")]
    for file in made:
        figure.savefig(file)
    return made
