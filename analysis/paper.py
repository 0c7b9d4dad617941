"""What the paper prints, typed: `paper_tables.yaml`, where every number has its source."""

from __future__ import annotations

from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

FILE = Path(__file__).parent / "paper_tables.yaml"
METRICS = ("speedup", "vbench", "lpips", "ssim", "psnr_db", "clip_score")
_STRICT = ConfigDict(extra="forbid")


@dataclass(kw_only=True, config=_STRICT)
class PrintedRow:
    """A row of a printed table.

    Attributes:
        method: of `conf/cache`; None: it is not run here, and `why` says why.
        level: rows of one level are compared with each other.
        threshold, computed_steps: the printed setting, where it is known.
        settings: overrides that make it, for a method with options of its own.
    """

    title: str
    method: str | None = None
    level: Literal["slow", "fast"]
    why: str | None = None
    cite: str = "ertacache"
    threshold: float | None = None
    computed_steps: int | None = None
    settings: list[str] = field(default_factory=list)
    speedup: float
    latency_s: float | None = None
    vbench: float | None = None
    lpips: float | None = None
    ssim: float | None = None
    psnr_db: float | None = None
    clip_score: float | None = None
    caveat: str | None = None

    def numbers(self) -> dict[str, float]:
        """What is printed of `METRICS`."""
        return {name: value for name in METRICS if (value := getattr(self, name)) is not None}


@dataclass(kw_only=True, config=_STRICT)
class Block:
    """The rows of one model.

    Attributes:
        printed: the model as the file names it; model: as `conf/model` does.
        steps: of the solver.
        overrides: by method, what it needs on this model.
    """

    printed: str
    title: str
    steps: int
    model: str
    overrides: dict[str, list[str]] = field(default_factory=dict)
    note: str | None = None
    rows: list[PrintedRow]


@dataclass(kw_only=True, config=_STRICT)
class PrintedTable:
    """A table of methods by model."""

    title: str
    source: str
    blocks: list[Block]


@cache
def data() -> dict[str, Any]:
    """All of the file."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def table(name: str) -> PrintedTable:
    """`table1_video` or `table2_image`."""
    return TypeAdapter(PrintedTable).validate_python(data()[name])


def figure(name: str) -> str:
    """What a figure of the paper shows, in a sentence."""
    return data()["figures"][name]


def fewer_steps(printed_model: str | None) -> dict[str, Any] | None:
    """What fewer steps are printed to cost on a model: {speedup, psnr_db, cite, …}; None if it is not printed."""
    rows = data()["best_published"].get(printed_model, [])
    return next((row for row in rows if row["method"].startswith("fewer_steps")), None)


def title(experiment: str) -> str:
    """What a table or figure is called, for people."""
    return data()["titles"].get(experiment, experiment)
