"""What the rows of a table say of the paper's claims, for the page.

The one place to change when claims come with the paper's numbers: `results` is all that the page asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

from analysis.comparison import Comparison
from analysis.records import Rows

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not decidable here"


@dataclass(frozen=True)
class Result:
    """A claim, what the paper prints, what was measured, their difference, and the verdict, as text."""

    claim: str
    paper: str
    ours: str
    delta: str
    verdict: str
    command: str


def results(rows: Rows) -> list[Result]:
    """Every claim of a table at every budget, decided by paired intervals (`Comparison.verdicts`)."""
    made = []
    for line in Comparison(rows).verdicts():
        claim, _, said = line.rpartition(": ")
        verdict, _, delta = said.partition(" (")
        made.append(Result(claim, "", "", delta.removesuffix(")"), verdict, rows.record.command))
    return made
