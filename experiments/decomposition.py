"""`experiment=decomposition`: where the error of a cached run comes from, step by step.

For the plan of `cache=…` on held-out prompts, the exact split of `erta.diagnosis` (injected, propagated, grid), the
open-loop shift beside it, and how much a small error after each of some steps has grown at the end.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

import erta
from analysis import plots
from erta.errors import ErtaError
from experiments.harness.arm import make_arm
from experiments.harness.calibrations import get_calibration
from experiments.models.call import call_kwargs
from experiments.models.load import load_pipeline
from experiments.output import console
from experiments.output.console import progress_bar
from experiments.output.run_folder import append_line, check_inputs, describe_inputs, describe_run, finish, read_lines
from experiments.prompts.choose import test_prompts

GAIN_STEPS = 10  # steps after which the growth of an error is measured, on the first prompt
PARTS = ("injected", "propagated", "grid")


def run(cfg: DictConfig, folder: Path) -> None:
    """Split every prompt's error; write `rows.jsonl`, `figures/decomposition.png` and `record.json`, print the parts."""
    prompts, pipe = test_prompts(cfg), load_pipeline(cfg)
    arm = make_arm(cfg, pipe, lambda: get_calibration(cfg, pipe))
    if arm.plan is None or all(arm.plan.mask):
        raise ErtaError(f"cache={cfg.cache.name} reuses nothing here, so there is no error to split")
    arm.plan.save(folder / "plan.json")
    check_inputs(folder, describe_inputs(pipe, prompts, arm.calibration))
    path = folder / "rows.jsonl"
    rows = read_lines(path)
    with progress_bar() as bar:
        task = bar.add_task("split the error", total=len(prompts), completed=len(rows))
        for prompt in prompts[len(rows) :]:
            split = erta.decompose(pipe, arm.plan, prompt.text, seed=prompt.seed, **call_kwargs(cfg))
            rows.append({"prompt": prompt.text, "seed": prompt.seed, **_plain(split)})
            append_line(path, rows[-1])
            bar.advance(task)
    measured = np.unique(np.linspace(0, arm.plan.num_steps - 1, GAIN_STEPS).astype(int)).tolist()
    with console.out.status("growth of small errors"):
        gains = erta.propagation_gain(pipe, prompts[0].text, measured, seed=prompts[0].seed, **call_kwargs(cfg))
    (folder / "figures").mkdir(exist_ok=True)
    by_step = {part: np.mean([row[f"{part}_by_step"] for row in rows], axis=0) for part in PARTS[:2]}
    growth = dict(zip(measured, gains.tolist(), strict=True))
    plots.decomposition(by_step, growth, folder / "figures" / "decomposition.png")
    summary = {part: float(np.mean([row["shares"][part] for row in rows])) for part in PARTS}
    open_loop = float(np.mean([row["open_loop_norm"] / row["total_norm"] for row in rows]))
    table = [[part, f"{summary[part]:+.1%}"] for part in PARTS]
    table += [["open loop, over the total (no part of it)", f"{open_loop:.2f}"]]
    table += [["left over by rounding", f"{max(row['closure'] for row in rows):.1e}"]]
    console.table(f"share of the error, mean over {len(rows)} prompts", ["part", ""], table)
    finish(
        folder,
        {
            **describe_run(cfg, [prompt.seed for prompt in prompts], [prompt.text for prompt in prompts]),
            "shares": summary,
            "open_loop_over_total": open_loop,
            "propagation_gain": growth,
        },
    )
    console.note(f"figure: {folder / 'figures' / 'decomposition.png'}")


def _plain(split: erta.Decomposition) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(split).items()}
