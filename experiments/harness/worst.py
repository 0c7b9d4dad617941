"""Keeps the samples of the worst prompts beside the record, so that one can look at what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from analysis import worst
from analysis.comparison import Comparison
from analysis.figures import slug
from analysis.records import Rows
from erta.errors import ErtaError
from experiments.harness.arm import Arm, make_arm
from experiments.harness.rows import Row, compose_row
from experiments.harness.setup import Setup
from experiments.output import console
from experiments.output.clips import is_whole, write_animation
from experiments.prompts.choose import Prompt

Made = Callable[[Prompt], np.ndarray]


def keep_worst_of_rows(
    setup: Setup, folder: Path, rows: list[Row], found: Rows, prompts: list[Prompt], count: int
) -> None:
    """Of each row the `count` worst samples, made anew: a generation each, and one uncached, where the folder lacks them."""
    outcomes = {one.row.key: one for one in Comparison(found).outcomes if one.samples}
    for row in rows:
        if not count or row.key not in outcomes:
            continue
        bad = worst.worst(outcomes[row.key], found.record.prompts, count)
        try:
            arm = make_arm(setup.with_cache(compose_row(row)))
            keep_worst(folder / worst.FOLDER / slug(row.key), bad, prompts, *sides(setup, arm))
        except ErtaError as error:
            console.note(f"the worst samples of {row.key} are not kept: {error}")


def keep_worst(folder: Path, bad: list[worst.Bad], prompts: list[Prompt], uncached: Made, made: Made) -> None:
    """Both samples of each, as small clips or pictures, where the folder lacks them."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in bad:
        for path, sample in zip(one.files(folder), (uncached, made), strict=True):
            if not is_whole(path):
                write_animation(sample(prompts[one.index]), path)


def sides(setup: Setup, arm: Arm) -> tuple[Made, Made]:
    """What makes the uncached sample of a prompt, and the arm's."""
    plain = Arm(None, setup.kwargs)
    return lambda prompt: plain.sample(setup.pipe, prompt).frames, lambda prompt: arm.sample(setup.pipe, prompt).frames
