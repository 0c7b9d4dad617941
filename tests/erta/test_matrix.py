"""The page of pipelines says what is found."""

from __future__ import annotations

import diffusers
import pytest

from tests.erta.matrix import PAGE, WORKS, verdict_of
from tests.erta.matrix_rows import ROWS


def cells(name: str) -> list[str]:
    """A pipeline's line of the page."""
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_knows_every_row():
    """Mutant: a row added without the page made anew."""
    for row in ROWS:
        assert cells(row.pipeline)[1] == row.transformer
    assert sum(cells(row.pipeline)[2] == WORKS for row in ROWS) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.pipeline)
def test_the_page_says_what_is_found(row):
    """Mutants: any break of a pipeline's calibration, plan, forwards, reuse or restoring."""
    if f"diffusers {diffusers.__version__}" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is of another version of diffusers: python -m tests.erta.matrix makes it anew")
    found = verdict_of(row)
    assert [found.status, found.branches, found.why] == cells(row.pipeline)[2:]
