"""The end of every figure of the paper: its record, the figure, and what it says of the claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from analysis import tables, verdicts
from analysis.records import FigureRecord, Measured
from experiments.output import console, tracking
from experiments.output.provenance import describe_run
from experiments.output.run_folder import finish
from experiments.prompts.choose import Prompt


def finish_figure(
    cfg: DictConfig, folder: Path, prompts: list[Prompt], series: dict[str, Any], claims: list[Measured]
) -> None:
    """Write `record.json`, `table.md` and the figure, print the verdicts, and mark the run as finished."""
    record = FigureRecord(**describe_run(cfg, prompts), experiment=cfg.experiment.name, series=series, claims=claims)
    written, said = tables.write_figure(folder, record), verdicts.results(record)
    finish(folder, record)
    with tracking.start(cfg, folder) as tracker:
        for values in zip(*(claim.values for claim in claims), strict=False):
            tracker.log({claim.text: value for claim, value in zip(claims, values, strict=True)})
        tracker.table("claims", verdicts.HEADINGS, [one.cells() for one in said])
        tracker.figures(folder / "figures")
        tracker.finish({one.claim: one.verdict for one in said})
    tables.show_results(said, record.command, console.table, console.note)
    console.note("\n".join(f"written: {path}" for path in written))


def rounded(values: Any) -> list[Any]:
    """Numbers of a record to five digits, nested as they are."""
    if isinstance(values, (list, tuple)):
        return [rounded(value) for value in values]  # type: ignore[misc]
    return float(f"{float(values):.5g}")  # type: ignore[return-value]
