"""`experiment=regimes`: which conclusion holds in which regime. Guidance is the dial: the higher, the more an early error decides.

Every method is compared at three guidances and three budgets (`experiment=compare`, a command for each guidance). For each
conclusion, such as "GCache is closer than ERTACache", the paired difference over prompts is taken in every cell: it holds, it
turns round, or the interval does not say.

The claims are the paper's three: the policy beats evenly spread steps, the adjustment helps, the rectification helps; in each
cell. `series.cells`: by conclusion and cell (guidance, budget), the paired differences in dB by prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from analysis import records
from analysis.comparison import IDENTICAL_DB, Comparison, Outcome
from analysis.records import Measured
from erta.errors import ErtaError
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.members import Member, run_members
from experiments.output import console
from experiments.prompts.choose import test_prompts

PAPERS = {
    "the policy's steps beat evenly spread ones": ("policy", "uniform"),
    "the timestep adjustment helps": ("policy_time", "policy"),
    "the rectification helps": ("ertacache", "policy_time"),
}
AGAINST = "ertacache"
CALLED = {"guidance_scale": "guidance", "true_cfg_scale": "true guidance"}


def run(cfg: DictConfig, folder: Path) -> None:
    """Compare at every guidance, then write the table, the figure and `record.json`. Raises what `run_members` raises."""
    members = members_of(cfg)
    run_members(cfg, folder, [one for _, one in members])
    tables = {guidance: Comparison(records.read_rows(folder / one.name)) for guidance, one in members}
    cells = conclusions(tables, CALLED[cfg.regimes.dial])
    claims = [
        Measured(
            text=f"{text} ({cell})",
            paper="yes",
            ours=f"{np.mean(values):+.2f} dB",
            values=rounded(values.tolist()),
            unit="dB",
        )
        for text in PAPERS
        for cell, values in cells.get(text, {}).items()
    ]
    series = {
        "cells": {text: {cell: rounded(v.tolist()) for cell, v in found.items()} for text, found in cells.items()}
    }
    console.table(
        f"{cfg.model.name}: mean differences in dB",
        ["", *next(iter(cells.values()))],
        [[text, *(f"{values.mean():+.1f}" for values in found.values())] for text, found in cells.items()],
    )
    finish_figure(cfg, folder, test_prompts(cfg), series, claims)


def members_of(cfg: DictConfig) -> list[tuple[float, Member]]:
    """A comparison for each guidance. Raises ErtaError for one that the dial does not reach."""
    own = cfg.regimes
    methods, dial = ",".join(own.methods), CALLED[own.dial]
    if own.dial == "true_cfg_scale" and min(own.guidances) < 1:
        raise ErtaError(f"regimes.guidances: true guidance is at least 1, not {min(own.guidances):g}")
    return [
        (
            guidance,
            Member(
                f"{dial.replace(' ', '_')}_{guidance:g}",
                (
                    "experiment=compare",
                    f"model={cfg.model.name}",
                    *dialled(own.dial, guidance),
                    f"compare.methods=[{methods}]",
                    "compare.timed=0",
                    f"bench.num_prompts={cfg.bench.num_prompts}",
                    f"calibration.num_prompts={cfg.calibration.num_prompts}",
                    f"calibration.knob_prompts={cfg.calibration.knob_prompts}",
                ),
                minutes=40,
            ),
        )
        for guidance in own.guidances
    ]


def dialled(dial: str, guidance: float) -> list[str]:
    """The overrides that set the guidance. With true guidance the embedded one is switched off."""
    embedded_off = ["model.guidance_scale=1"] if dial == "true_cfg_scale" else []
    return [*embedded_off, f"model.{dial}={guidance:g}"]


def conclusions(tables: dict[float, Comparison], dial: str = "guidance") -> dict[str, dict[str, np.ndarray]]:
    """By conclusion and cell, the paired differences by prompt. A row that a cell lacks leaves it out."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for guidance, table in tables.items():
        for place in table.groups:
            rows = {one.row.label: one for one in table.of(place) if one.samples}
            cell = f"{dial} {guidance:g}, {place[1]} steps"
            for text, (better, worse) in pairs(rows).items():
                found.setdefault(text, {})[cell] = decibels(rows[better]) - decibels(rows[worse])
    return found


def pairs(rows: dict[str, Outcome]) -> dict[str, tuple[str, str]]:
    """What is said of the rows of one budget: the paper's claims, every other row against ERTACache, warm-ups."""
    asked = {text: pair for text, pair in PAPERS.items() if set(pair) <= set(rows)}
    for label, one in rows.items():
        without = f"{label}, no warm-up"
        if without in rows:
            asked[f"{one.row.title}: its warm-up helps"] = (label, without)
        if AGAINST in rows and label not in (AGAINST, "policy", "policy_time", "uniform") and "warm-up" not in label:
            asked[f"{one.row.title} is closer than {rows[AGAINST].row.title}"] = (label, AGAINST)
    return asked


def decibels(outcome: Outcome) -> np.ndarray:
    """PSNR by prompt, mean over noises, (prompts,); identical samples as 100 dB."""
    values: list[Any] = [IDENTICAL_DB if one.psnr_db is None else one.psnr_db for one in outcome.samples]
    return np.array(values, float).reshape(outcome.noises, -1).mean(0)
