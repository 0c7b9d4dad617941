"""`experiment=decomposition`: where the error of a cached run comes from, step by step.

For the plan of `cache=…` on held-out prompts, the exact split of `erta.diagnosis` (injected, propagated, grid), the
open-loop shift beside it, and how much a small error put in after each of some steps has grown at the end, over
`decomposition.growth_prompts` prompts and `decomposition.growth_directions` random directions each.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

import erta
from analysis import decomposition
from analysis.records import DecompositionRecord
from erta.errors import ErtaError
from experiments.harness.arm import make_arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.setup import Setup
from experiments.harness.steps import step_table
from experiments.output import console, tracking
from experiments.output.provenance import describe_inputs, describe_run
from experiments.output.run_folder import check_inputs, finish
from experiments.prompts.choose import Prompt, test_prompts

GROWTH_STEPS = 6  # steps after which the growth of an error is measured
PARTS = ("injected", "propagated", "grid")


def run(cfg: DictConfig, folder: Path) -> None:
    """Split every prompt's error; write `rows.jsonl`, `growth.jsonl`, the figure and `record.json`, print the parts."""
    prompts, setup = test_prompts(cfg), Setup(cfg)
    disturbed = test_prompts(cfg, "decomposition.growth_prompts")
    arm = make_arm(setup)
    if arm.plan is None or all(arm.plan.mask):
        raise ErtaError(f"cache={cfg.cache.name} reuses nothing here, so there is no error to split")
    arm.plan.save(folder / "plan.json")
    check_inputs(folder, describe_inputs(setup.pipe, [*prompts, *disturbed], arm.calibration))
    with tracking.start(cfg, folder) as tracker:
        rows = split_errors(setup, arm.plan, prompts, folder / "rows.jsonl", tracker)
        growth = grow_errors(setup, disturbed, cfg.decomposition.growth_directions, folder / "growth.jsonl", tracker)
        record = DecompositionRecord(
            **describe_run(cfg, prompts),
            shares={part: float(np.mean([row["shares"][part] for row in rows])) for part in PARTS},
            by_step={part: np.mean([row[f"{part}_by_step"] for row in rows], axis=0).tolist() for part in PARTS[:2]},
            open_loop_over_total=float(np.mean([row["open_loop_norm"] / row["total_norm"] for row in rows])),
            growth=growth,
            mask=[int(computed) for computed in arm.plan.mask],
            total_norm=float(np.mean([row["total_norm"] for row in rows])),
        )
        finish(folder, record)
        figure = decomposition.draw(record, folder)
        steps = range(len(arm.plan.mask))
        grown = [float(np.median(growth[step])) if step in growth else None for step in steps]
        sigmas = [float(sigma) for sigma in arm.plan.sigmas]
        tracker.table("steps", *step_table(record.mask or [], sigmas, arm, **record.by_step, growth=grown))
        tracker.figures(figure.parent)
        tracker.finish({"shares": record.shares, "open_loop_over_total": record.open_loop_over_total})
    rounding = max(row["closure"] for row in rows)
    lines = [*decomposition.lines(record), ["left over by rounding", f"{rounding:.1e}"]]
    console.table(f"share of the error, mean over {len(rows)} prompts", ["part", ""], lines)
    console.note(f"figure: {figure}")


def split_errors(
    setup: Setup, plan: erta.Plan, prompts: list[Prompt], path: Path, tracker: tracking.Tracker
) -> list[dict[str, Any]]:
    """`erta.decompose` on every prompt; finished ones are kept in `path`."""

    def measure(prompt: Prompt) -> dict[str, Any]:
        return _plain(erta.decompose(setup.pipe, plan, prompt.text, seed=prompt.seed, **setup.kwargs))

    return by_prompt("split the error", prompts, measure, path, lambda row: tracker.log(row, "split"))


def grow_errors(
    setup: Setup, prompts: list[Prompt], directions: int, path: Path, tracker: tracking.Tracker
) -> dict[int, list[float]]:
    """By step, `erta.propagation_gain` of every prompt and direction; finished prompts are kept in `path`."""
    steps = np.unique(np.linspace(0, setup.cfg.model.num_inference_steps - 1, GROWTH_STEPS).astype(int)).tolist()

    def measure(prompt: Prompt) -> dict[str, Any]:
        gains = erta.propagation_gain(
            setup.pipe, prompt.text, steps, seed=prompt.seed, directions=directions, **setup.kwargs
        )
        return {"steps": steps, "growth": gains.tolist()}

    rows = by_prompt("growth of small errors", prompts, measure, path, lambda row: tracker.log(_medians(row), "growth"))
    return {step: [value for row in rows for value in row["growth"][place]] for place, step in enumerate(steps)}


def _medians(row: dict[str, Any]) -> dict[str, float]:
    """A prompt's growth by step, median over its directions."""
    return {f"step {step}": float(np.median(values)) for step, values in zip(row["steps"], row["growth"], strict=True)}


def _plain(split: erta.Decomposition) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(split).items()}
