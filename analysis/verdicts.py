"""What a measurement says of a claim, decided by the interval of its paired differences and never by hand."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from analysis.intervals import Interval, paired_interval
from analysis.records import FigureRecord, Measured

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not decidable here"
VERDICTS = (REPRODUCED, CONTRADICTED, OPEN)
HEADINGS = ["claim", "paper", "ours", "Δ (95 %)", "verdict", "command"]


@dataclass(frozen=True)
class Result:
    """A claim with its verdict, as text.

    Attributes:
        claim: what is claimed; paper: what is printed about it, of the paper's models; ours: what was measured, of ours.
        delta: the paired difference with its 95 % interval, positive where it is as claimed.
        verdict: one of `REPRODUCED`, `CONTRADICTED`, `OPEN`.
        command: what measures it.
    """

    claim: str
    paper: str
    ours: str
    delta: str
    verdict: str
    command: str

    def cells(self) -> list[str]:
        """In the order of `HEADINGS`."""
        return list(astuple(self))


def verdict(difference: Interval | None, margin: float = 0.0) -> str:
    """Reproduced if all of the interval lies above -margin, contradicted if all of it lies below; None is no difference."""
    if difference is None:
        return OPEN
    return REPRODUCED if difference.low > -margin else CONTRADICTED if difference.high < -margin else OPEN


def results(record: FigureRecord) -> list[Result]:
    """What a figure's measurements say of its claims."""
    return [_result(claim, record.command) for claim in record.claims]


def _result(claim: Measured, command: str) -> Result:
    values = np.asarray(claim.values, float)
    interval = paired_interval(values) if len(values) else None
    delta = f"{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}] {claim.unit}" if interval else ""
    return Result(claim.text, claim.paper, claim.ours, delta, verdict(interval), command)
