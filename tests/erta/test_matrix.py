"""The page of pipelines says what is found."""

from __future__ import annotations

import diffusers
import pytest

from tests.erta.matrix import PAGE, ROWS, WORKS, record_of_before, verdict_of


def cells(name: str) -> list[str]:
    """A pipeline's line of the page."""
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_knows_every_row():
    """Mutants: a row added without the page made anew; pipelines that worked lost."""
    before = record_of_before()["verdicts"]
    for row in ROWS:
        assert cells(row.pipeline)[1:3] == [row.transformer, before.get(row.pipeline, "not tried")]
    works = sum(cells(row.pipeline)[3] == WORKS for row in ROWS)
    assert works >= 75 and f"({works} of {len(ROWS)} work)" in PAGE.with_name("README.md").read_text(encoding="utf-8")
    assert all(cells(name)[3] == WORKS for name, status in before.items() if status == WORKS)
    assert len(ROWS) == len({row.pipeline for row in ROWS})


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.pipeline)
def test_the_page_says_what_is_found(row):
    """Every row, in less than three minutes on two cores.

    Mutants: any break of a pipeline's calibration, plan, forwards, reuse or restoring.
    """
    if f"diffusers {diffusers.__version__}" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is of another version of diffusers: python -m tests.erta.matrix makes it anew")
    found = verdict_of(row)
    assert [found.status, found.branches, found.why] == cells(row.pipeline)[3:]
