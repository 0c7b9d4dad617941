"""MeanCache (Gao et al., 2026, arXiv 2601.19961): a reused step takes the velocity that two computed steps foretell.

Site: the output. Stored: the latents z of the last two computed steps r and t, and the velocity of t in each guidance
branch. With v the guided velocity, `JVP = (v_t - (z_t - z_r) / (sigma_t - sigma_r)) / (sigma_t - sigma_r)` says how v
leaves its mean since r, and a reused step at s takes `v_t + (sigma_s - sigma_t) JVP`; the same JVP is added in every
branch, so guidance keeps it. Static: the schedule is a shortest path over `C(i, j)^5`, which suppresses peaks, with C the
L1 distance between the latent that this foretells at j from i and that of an uncached run, mean over calibration prompts.
Where we differ: 3 prompts in place of 50 with 5 noises; in C the step r lies as far before i as j behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from erta.errors import ErtaError
from erta.guidance import combining_scale_of, guide
from erta.online import Call, OnlineRule, online
from erta.policy import Mask
from erta.scheduler import with_grid
from erta.solver import Computed, Predict, linear_solver
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.paths import best_path
from experiments.methods.common.recorders import record
from experiments.methods.common.searched import TrajectoryRecorder

PROMPTS = 3


def arm(setup: Setup) -> Arm:
    """MeanCache on its schedule for the budget; every number of computed steps can be reached.

    Raises ErtaError for another site: the path is that of the latent.
    """
    if setup.cfg.cache.site != "output":
        raise ErtaError("cache=meancache follows the path of the latent: use cache.site=output")
    power, sigmas = check_number("power", setup.options["power"], 0), setup.grid.sigmas
    scale = combining_scale_of(setup.kwargs)

    def measure() -> dict[str, Any]:
        costs = [path_costs(one, sigmas, scale) for one in record(setup, TrajectoryRecorder, PROMPTS)]
        return {"costs": np.mean(costs, axis=0).tolist()}

    costs = np.array(kept(setup, "meancache", [PROMPTS], measure)["costs"])
    mask = best_path(np.where(costs < 0, np.inf, np.abs(costs) ** power), setup.step_count())
    rule = MeanCache(mask, sigmas, scale)
    report = {"policy": setup.cfg.cache.name, "mask": [int(step) for step in mask]}
    solver = linear_solver(with_grid(setup.pipe.scheduler, sigmas), mask, predict=foretold(sigmas), report=report)
    return Arm(
        None, setup.kwargs, attach=lambda pipe: online(pipe, rule, reuse="velocity"), report=report, solver=solver
    )


def foretold(sigmas: np.ndarray) -> Predict:
    """What `MeanCache` gives at a reused step, of the guided output: for the solver that it amounts to."""

    def predict(step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
        if len(computed) < 2:
            return computed[-1].v
        r, t = computed[-2:]
        slope = mean_slope(t.x, r.x, t.v, float(sigmas[t.step] - sigmas[r.step]))
        return t.v + float(sigmas[step] - sigmas[t.step]) * slope

    return predict


def mean_slope(z_t: Any, z_r: Any, v_t: Any, between: float) -> Any:
    """JVP from the latents of two steps, sigma_t - sigma_r = `between`, and the later one's velocity."""
    return (v_t - (z_t - z_r) / between) / between


class MeanCache(OnlineRule):
    """See the module.

    Args:
        mask: which steps are computed.
        sigmas: the grid, (num_steps + 1,).
        guidance_scale: None for a model without guidance branches.
    """

    def __init__(self, mask: Mask, sigmas: np.ndarray, guidance_scale: float | None) -> None:
        self.mask, self.sigmas, self.guidance_scale = mask, sigmas, guidance_scale
        self.begin(len(mask))

    def begin(self, num_steps: int) -> None:
        if num_steps != len(self.mask):
            raise ErtaError(f"the schedule is for {len(self.mask)} steps, not {num_steps}")
        self.steps: list[int] = []  # the last two computed ones
        self.latents: list[torch.Tensor] = []
        self.velocity: dict[str, torch.Tensor] = {}  # of the last one, by branch

    def should_compute(self, call: Call) -> bool:
        return self.mask[call.step]

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        if self.steps[-1:] != [call.step]:
            self.steps = [*self.steps[-1:], call.step]
            self.latents = [*self.latents[-1:], call.x]
            self.velocity = {}
        self.velocity[call.branch] = velocity

    def stand_in(self, call: Call, kept: torch.Tensor) -> torch.Tensor:
        if len(self.steps) < 2:
            return kept
        at_r, at_t = (float(self.sigmas[step]) for step in self.steps)
        z_r, z_t = (latent.float() for latent in self.latents)
        v_t = guide({branch: v.float() for branch, v in self.velocity.items()}, self.guidance_scale)
        slope = mean_slope(z_t, z_r, v_t, at_t - at_r)
        return (kept.float() + (float(self.sigmas[call.step]) - at_t) * slope).to(kept.dtype)


def path_costs(recorder: TrajectoryRecorder, sigmas: np.ndarray, guidance_scale: float | None) -> np.ndarray:
    """(N, N + 1): how far from the uncached latent at j the path foretold at i ends; -1 where there is no edge."""
    branches, steps = recorder.seen, recorder.num_steps
    z = [seen[0] for seen in next(iter(branches.values()))]
    v = [guide({branch: seen[i][1] for branch, seen in branches.items()}, guidance_scale) for i in range(steps)]
    s = [float(sigma) for sigma in sigmas]
    z.append(z[-1] + (s[-1] - s[-2]) * v[-1])  # the run's end is no input of the transformer
    costs = np.full((steps, steps + 1), -1.0)
    for i in range(steps):
        costs[i, i + 1] = 0.0
        for j in range(i + 2, steps + 1):
            r = max(0, i - (j - i))
            slope = mean_slope(z[i], z[r], v[i], s[i] - s[r]) if i else torch.zeros_like(v[0])
            weight = sum((s[k + 1] - s[k]) * (s[k] - s[i]) for k in range(i, j))  # of the slope in what is integrated
            costs[i, j] = (z[i] + (s[j] - s[i]) * v[i] + weight * slope - z[j]).abs().mean().item()
    return costs
