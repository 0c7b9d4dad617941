"""GCache (2026, arXiv 2608.13043): residual differences weighted by when they happen, summed along a shortest path.

Site: as `cache.site` says; the output by default. Stored: the last residual in each guidance branch. Static: reusing
step i's residual at step k costs `mean|r_i - r_k| exp(w(t_k))`, with w a Bernstein polynomial of degree 3 with
coefficients in 0 … 10 over the run (t from 0 at the first step to 1 at the last); an edge i → j is the sum over i < k <
j. Of `trials` random weights, and none at all, those are taken whose schedule leaves the smallest error of the final
latents on one calibration prompt. Where we differ: a random search in place of 500 steps of Bayesian optimisation, the
final latents' mean squared error in place of LPIPS + 1 - SSIM, 3 prompts in place of 512.
"""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np

from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.paths import best_path
from experiments.methods.common.recorders import record
from experiments.methods.common.searched import TrajectoryRecorder, planned_arm, trial_runs
from experiments.output.console import progress_bar

PROMPTS, DEGREE, LARGEST = 3, 3, 10.0


def arm(setup: Setup) -> Arm:
    """GCache's schedule for the budget; every number of computed steps can be reached."""
    trials, count = check_number("trials", setup.options["trials"], 0, whole=True), setup.step_count()

    def find() -> dict[str, Any]:
        recorders = record(setup, TrajectoryRecorder, PROMPTS)
        change = np.mean([residual_change(recorder) for recorder in recorders], axis=0)
        run, draw = trial_runs(setup), np.random.default_rng(setup.cfg.seed)
        reference = run(None)
        tried: list[dict[str, Any]] = []
        with progress_bar() as bar:
            for trial in bar.track(range(trials + 1), description="gcache: a run for each weighting"):
                weights = draw.uniform(0, LARGEST, DEGREE + 1) if trial else np.zeros(DEGREE + 1)
                mask = best_path(edge_costs(change, weights), count)
                known = [one for one in tried if one["mask"] == [int(step) for step in mask]]
                error = known[0]["mse"] if known else (run(mask) - reference).pow(2).mean().item()
                tried.append({"weights": weights.tolist(), "mask": [int(step) for step in mask], "mse": error})
        return min(tried, key=lambda one: one["mse"])

    report = kept(setup, "gcache", [trials, count, PROMPTS, setup.cfg.seed, setup.cfg.cache.reuse], find)
    return planned_arm(setup, tuple(map(bool, report["mask"])), report)


def residual_change(recorder: TrajectoryRecorder) -> np.ndarray:
    """mean |r_i - r_k| of every pair of steps, mean over guidance branches, (N, N)."""
    steps = recorder.num_steps
    change = np.zeros((steps, steps))
    for seen in recorder.seen.values():
        for i in range(steps):
            for k in range(i + 1, steps):
                change[i, k] += (seen[i][2] - seen[k][2]).abs().mean().item() / len(recorder.seen)
    return change


def edge_costs(change: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N, N + 1): the weighted changes of all steps between i and j."""
    steps = len(change)
    t = np.arange(steps) / max(1, steps - 1)
    exponent = sum(w * comb(DEGREE, n) * t**n * (1 - t) ** (DEGREE - n) for n, w in enumerate(weights))
    weighted = np.triu(change * np.exp(exponent), 1)
    cost = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        cost[i, i + 1 :] = np.concatenate([[0.0], np.cumsum(weighted[i, i + 1 :])])
    return cost
