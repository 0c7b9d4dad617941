"""`experiment=fig2b_trajectory_drift`: the paper's Figure 2b, how far cached trajectories drift from the uncached one.

Claim under test: with adjusted steps the trajectory drifts less than with fixed ones, both with the plan of `cache.…`'s
budget. A moved grid passes other noise levels at the same step, so the distance is taken at the same sigma, where the uncached
trajectory is interpolated in a straight line between its steps. The end, where no interpolation is needed, decides.

`series.drift`: by arm (prompts, steps), `‖xc - x‖₂ / ‖x‖₂` after every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from analysis import paper
from analysis.records import Measured
from erta.pipeline import latent_call
from experiments.harness.arm import Arm, make_arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.rows import Row, compose_row
from experiments.harness.setup import Setup
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs
from experiments.prompts.choose import Prompt, test_prompts

ARMS = {"fixed steps (policy)": "policy", "adjusted steps (policy + time)": "policy_time", "ERTACache": "ertacache"}
FIXED, ADJUSTED, _ = ARMS


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure every prompt; write `rows.jsonl`, the figure, `table.md` with the verdict and `record.json`."""
    prompts, setup = test_prompts(cfg), Setup(cfg)
    arms = {name: make_arm(setup.with_cache(compose_row(Row(name, method)))) for name, method in ARMS.items()}
    grids = {name: arm.sigmas(setup) for name, arm in arms.items()}
    check_inputs(folder, describe_inputs(setup.pipe, prompts, arms[FIXED].calibration))

    def measure(prompt: Prompt) -> dict[str, Any]:
        uncached = trajectory(setup.pipe, Arm(None, setup.kwargs), prompt)
        return {
            "drift": {
                name: rounded(drift(trajectory(setup.pipe, arm, prompt), grids[name], uncached, setup.grid.sigmas))
                for name, arm in arms.items()
            }
        }

    lines = by_prompt("drift", prompts, measure, folder / "rows.jsonl")
    drifts = {name: np.array([line["drift"][name] for line in lines]) for name in ARMS}
    series = {"drift": {name: values.tolist() for name, values in drifts.items()}}
    finish_figure(cfg, folder, prompts, series, [claim(drifts[FIXED][:, -1], drifts[ADJUSTED][:, -1])])


def trajectory(pipe: Any, arm: Arm, prompt: Prompt) -> list[torch.Tensor]:
    """The latent after every step, on the CPU in float32."""
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].float().cpu())
        return {}

    with arm.put_on(pipe):
        pipe(**latent_call(prompt.text, prompt.seed, {**arm.kwargs, "callback_on_step_end": keep}))
    return latents


def drift(
    cached: list[torch.Tensor], sigmas: np.ndarray, uncached: list[torch.Tensor], nominal: np.ndarray
) -> list[float]:
    """Relative L2 distance of two trajectories after every step of the first, at its sigma.

    Args:
        sigmas, nominal: their grids, one longer than their steps. Between two steps `uncached` is a straight line in sigma;
            before its first one it is what it is after it, as the noise is not kept.
    """
    return [_distance(x, _at(float(sigma), uncached, nominal)) for x, sigma in zip(cached, sigmas[1:], strict=True)]


def _at(sigma: float, latents: list[torch.Tensor], grid: np.ndarray) -> torch.Tensor:
    place = int(np.clip(np.searchsorted(-grid, -sigma), 2, len(grid) - 1))  # grid[place - 1] > sigma >= grid[place]
    high, low = float(grid[place - 1]), float(grid[place])
    share = min(max((high - sigma) / (high - low), 0.0), 1.0)
    return latents[place - 2] + share * (latents[place - 1] - latents[place - 2])


def _distance(x: torch.Tensor, other: torch.Tensor) -> float:
    return float((x - other).norm() / other.norm())


def claim(fixed: np.ndarray, adjusted: np.ndarray) -> Measured:
    """What the drifts at the end, each (prompts,), say of the adjustment."""
    return Measured(
        text="with adjusted steps the trajectory ends closer to the uncached one than with fixed steps",
        paper=paper.figure("fig2b_trajectory_drift"),
        ours=f"relative distance at the end, median {np.median(adjusted):.3g} against {np.median(fixed):.3g}",
        values=rounded((20 * np.log10(fixed / adjusted)).tolist()),
        unit="dB closer",
    )
