"""The worst prompts of a row, and the sheet that shows them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from analysis import figures, worst
from analysis.comparison import Comparison
from tests.analysis.tables import one, row, table


def made_up(psnr: list[float | None], other: tuple[int, ...] = (), key: str = "ertaplan"):
    """A table with one row; the scene is read otherwise on the prompts in `other`."""
    samples = [one(value, scene={"all": place not in other}) for place, value in enumerate(psnr)]
    made = table([(row(key, 3), samples)])
    names = [f"prompt {place}" for place in range(len(psnr))]
    return replace(
        made, record=replace(made.record, prompts=names, table=replace(made.record.table, figures=["worst_samples"]))
    )


def test_flips_come_first_then_the_lowest():
    """Mutants: best first, another scene passed over, identical samples the worst, a place of the sorted list for the prompt's."""
    rows = made_up([60.0, None, 28.0, 45.0, 50.0, 20.0], other=(4,))
    (outcome,) = Comparison(rows).outcomes
    found = worst.worst(outcome, rows.record.prompts, 4)
    assert [(bad.index, bad.prompt, bad.flipped) for bad in found] == [
        (5, "prompt 5", True), (2, "prompt 2", True), (4, "prompt 4", True), (3, "prompt 3", False),
    ]  # fmt: skip
    assert [bad.other_scene for bad in found] == [False, False, True, False]
    assert worst.worst(outcome, rows.record.prompts, 9)[-1].psnr_db == 100.0


def test_the_sheet_shows_both_samples(tmp_path):
    """A row a prompt, the uncached sample left. Mutants: sides exchanged, another prompt's sample, rows without samples drawn,
    a flip that is not red."""
    rows = made_up([60.0, 28.0, 45.0])
    kept = tmp_path / "worst" / figures.slug("ertaplan (3)")
    kept.mkdir(parents=True)
    for index, grey in ((1, 40), (2, 90)):
        for side, shift in (("uncached", 0), ("made", 100)):
            picture = Image.fromarray(np.full((8, 8, 3), grey + shift, np.uint8))
            picture.save(kept / f"{index:03d}_{side}.webp", lossless=True)
    (figure,) = [drawn for name, drawn in figures.worst_samples(rows, tmp_path) if name == "worst_ertaplan_3"]
    axes = np.array(figure.axes).reshape(2, 4)
    shown = [[int(axis.images[0].get_array()[0, 0, 0]) for axis in line[1:3]] for line in axes]
    assert shown == [[40, 140], [90, 190]]
    texts = [line[0].texts[0] for line in axes]
    assert [text.get_text() for text in texts] == ["prompt 1\n28.0 dB", "prompt 2\n45.0 dB"]
    assert texts[0].get_color() != texts[1].get_color()
    written = figures.of_rows(rows, tmp_path)
    assert [path.name for path in written] == ["worst_ertaplan_3.png"] and written[0].stat().st_size > 5000
    assert not list(figures.worst_samples(rows, tmp_path / "elsewhere"))
