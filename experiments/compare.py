"""`experiment=compare`: every method of `conf/cache/` in one harness, at equal budgets.

A row is a method at a budget of computed steps: N/2, N/3 and N/4, or `compare.budgets`. Methods with a parameter of their own find its
value for the budget on calibration prompts; the forwards of a row are those counted on the test prompts. A method that
cannot run here, that cannot meet a budget, or that fails inside the pipeline, leaves a row with the reason, and the others go on.
Oracles have seen the test samples. They are sampled if `compare.oracles` or `compare.methods` asks for them, and are never counted
as the best of the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from analysis.records import ORACLE, Table
from erta.errors import BudgetError, ErtaError
from experiments.harness import catalogue
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row
from experiments.output import console

SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS, QUICK_KNOB_PROMPTS, QUICK_TIMED = 8, (2,), 1, 4
COLUMNS = [
    "forwards",
    "speedup",
    "psnr_db",
    "gain",
    "ssim",
    "lpips",
    "scene",
    "scene_change",
    "cache_bytes",
    "calibration_s",
]


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row; write the rows, `table.md`, the figures and `record.json`. Raises what `run_table` raises."""
    quick = cfg.compare.quick
    table = Table(
        reference=cfg.compare.reference, columns=COLUMNS, best_first=True, figures=["methods", "worst_samples"]
    )
    rows = table_rows(cfg)
    if cfg.compare.reference not in {row.label for row in rows}:
        console.note(
            f"compare.reference={cfg.compare.reference} is not among compare.methods: nothing is paired with it"
        )
    prompts, timed = (QUICK_PROMPTS, QUICK_TIMED) if quick else (None, None)
    run_table(cfg, folder, rows, table, prompts, timed, worst=cfg.compare.worst)


def table_rows(cfg: DictConfig) -> list[Row]:
    """Every method at every budget, the reference first; what knows no budget once.

    Raises ErtaError for a method in `compare.methods`, or a reference, that does not exist, BudgetError for too many steps.
    """
    facts = {name: catalogue.facts(name) for name in catalogue.names()}
    known = [name for name, about in facts.items() if about.has_budget]
    for key, asked in (("methods", cfg.compare.methods), ("reference", [cfg.compare.reference])):
        if unknown := [name for name in asked if name not in known]:
            raise ErtaError(f"compare.{key}: there is no {', '.join(unknown)}. Choose from {', '.join(known)}")
    quick = cfg.compare.quick
    oracles = [name for name in known if facts[name].group == ORACLE]
    usual = [name for name in known if name not in oracles and not (quick and facts[name].slow_search)]
    names = list(cfg.compare.methods) or usual
    names += [name for name in oracles if cfg.compare.oracles and name not in names]
    names.sort(key=lambda name: name != cfg.compare.reference)
    steps = cfg.model.num_inference_steps
    counts = list(dict.fromkeys(cfg.compare.budgets)) or [
        round(steps / one) for one in (QUICK_SPEEDUPS if quick else SPEEDUPS)
    ]
    if too_many := [count for count in counts if count > steps]:
        raise BudgetError(f"compare.budgets: {too_many[0]} computed steps of {steps} cannot be")
    floor = [Row(name, name, title=about.title) for name, about in facts.items() if not about.has_budget]
    return [*floor, *(row for count in counts for row in budget_rows(names, facts, count, quick))]


def budget_rows(names: list[str], facts: dict[str, Any], count: int, quick: bool) -> list[Row]:
    """The rows of one budget: methods, their grids without a cache, and those with a warm-up a second time without."""
    searching = (f"calibration.knob_prompts={QUICK_KNOB_PROMPTS}",) if quick else ()
    grids = {name: facts[name].steps_of for name in names if facts[name].steps_of}
    rows = []
    for name in names:
        of = catalogue.configuration(name).options[grids[name]] if name in grids else None
        title = facts[name].title if of is None else f"{facts[name].title} of {facts[of].title}"
        rows.append(Row(name, name, searching, count, title=title, searches=of))
    if quick:
        return rows
    for grid, option in grids.items():
        own = catalogue.configuration(grid).options[option]
        for name in names:
            if facts[name].whole_steps and not facts[name].same_steps_as and name != own:
                label, title = f"{grid} of {name}", f"{facts[grid].title} of {facts[name].title}"
                options = (f"cache.options.{option}={name}",)
                rows.append(Row(label, grid, options, count, title=title, searches=name))
    # The first steps that some methods compute as published take up to 10 of 17: how are those methods without that?
    for name in names:
        if less := facts[name].no_warmup:
            without = tuple(f"cache.options.{key}={'null' if v is None else v}" for key, v in less.items())
            rows.append(Row(f"{name}, no warm-up", name, without, count, title=f"{facts[name].title}, no warm-up"))
    return rows
