"""The worst prompts of a row: what the uncached run shows, and what the method made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from analysis.comparison import FLIPPED_DB, IDENTICAL_DB, Outcome
from analysis.style import WIDTH

FOLDER = "worst"  # of a run, beside its record
SIDES = ("uncached", "made")
ROW_INCHES = 1.1


@dataclass(frozen=True)
class Bad:
    """A prompt on which a method was far off."""

    index: int
    prompt: str
    psnr_db: float
    other_scene: bool = False  # the checker reads another scene than in the uncached sample

    @property
    def flipped(self) -> bool:
        """Whether it counts as another outcome."""
        return self.psnr_db < FLIPPED_DB or self.other_scene

    def files(self, folder: Path) -> list[Path]:
        """Of the uncached sample and of the method's."""
        return [folder / f"{self.index:03d}_{side}.webp" for side in SIDES]


def worst(outcome: Outcome, prompts: list[str], count: int) -> list[Bad]:
    """The `count` worst samples of a row: flips first, then the lowest PSNR. Samples without a flip count too."""
    scenes = outcome.uncached_scene or [None] * len(outcome.samples)
    found = [
        Bad(
            index,
            prompts[index],
            IDENTICAL_DB if sample.psnr_db is None else sample.psnr_db,
            sample.scene is not None and scene is not None and sample.scene != scene,
        )
        for index, (sample, scene) in enumerate(zip(outcome.samples, scenes, strict=True))
    ]
    return sorted(found, key=lambda one: (not one.flipped, one.psnr_db))[:count]


def worst_figure(title: str, found: list[Bad], folder: Path) -> Figure:
    """A row a prompt; columns: the uncached sample, the method's, their difference; first, middle and last frame of clips."""
    samples = [[plots.shown_frames(path) for path in one.files(folder)] for one in found]
    differences = [plots.difference(*pair) for pair in samples]
    factor = plots.amplification(differences)
    figure = Figure((WIDTH, 0.5 + ROW_INCHES * len(found)))
    axes = figure.subplots(len(found), 4, squeeze=False, width_ratios=[1.1, 1, 1, 1])
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (one, pair, differs) in enumerate(zip(found, samples, differences, strict=True)):
        grey = np.minimum(differs * factor, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
        said = [f"{one.psnr_db:.1f} dB", *(["another scene is read"] if one.other_scene else [])]
        text = f"{plots.caption(one.prompt, 34, 4)}\n{', '.join(said)}"
        look = {"color": "#b3261e" if one.flipped else "#222222", "fontsize": 7.5, "parse_math": False}
        axes[place, 0].text(0, 0.5, text, transform=axes[place, 0].transAxes, va="center", **look)
        names = ("uncached", title, f"difference × {factor}")
        for axis, frames, name in zip(axes[place, 1:], (*pair, grey), names, strict=True):
            axis.imshow(np.concatenate(list(frames), axis=1), interpolation="nearest")
            if place == 0:
                axis.set_title(plots.caption(name, 40), fontsize=8, pad=3, parse_math=False)
    figure.suptitle(
        f"the {len(found)} worst prompts; red: below {FLIPPED_DB:g} dB, or another scene is read", fontsize=9
    )
    return figure
