"""OSS (Pei et al., 2025, arXiv 2503.21774): where the steps lie, by running the student from every one of them.

Site: none. Stored: nothing. Static: with i steps spent, the state at grid point j is the best of all Euler steps to it from the
states with i - 1 steps spent, best against the uncached trajectory; the path that ends nearest is the grid, and the pipeline's
own solver runs on it. Costs K N forwards a prompt. Where we differ: one grid for all prompts, found on `prompts` calibration
prompts together, where the publication has one a sample and averages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from erta.fitted_scheduler import FittedScheduler
from erta.lockstep import Asked, run_in_step
from erta.policy import Mask
from erta.scheduler import with_grid
from erta.solver import linear_solver
from erta.trajectories import Trajectories, batch_call
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.searched import grid_arm
from experiments.methods.common.solvers import get_trajectories, step_bar


def arm(setup: Setup) -> Arm:
    """The pipeline's own solver on OSS's grid."""
    prompts = check_number("prompts", setup.options["prompts"], 1, whole=True)
    trajectories, count = get_trajectories(setup), setup.step_count()

    def search() -> dict[str, Any]:
        return {"mask": [int(on) for on in searched_mask(setup, trajectories, count, prompts)]}

    mask = tuple(map(bool, kept(setup, "oss", [prompts, count], search)["mask"]))
    return grid_arm(setup, mask, {"prompts": prompts})


def searched_mask(setup: Setup, trajectories: Trajectories, count: int, prompts: int) -> Mask:
    """The grid of `count` steps. All states with the same step to come run side by side, one call for each number spent."""
    few = trajectories.only(range(min(prompts, trajectories.num_prompts)))
    frame = FittedScheduler(
        linear_solver(with_grid(setup.pipe.scheduler, few.sigmas), (True,) * few.num_steps), setup.pipe.scheduler
    )
    search = Search(few, count)
    call = {**few.record["call"], "num_inference_steps": few.num_steps}
    calls = [batch_call(few.record["prompts"], few.record["seeds"], False, call) for _ in range(count)]
    with step_bar(f"oss: {count} x {few.num_steps} forwards a prompt") as advance:

        def answer(node: int, asked: list[Asked]) -> list[torch.Tensor]:
            advance(node + 1, few.num_steps)
            return search.step(node, asked)

        run_in_step(setup.pipe, frame, calls, answer)
    return search.mask()


class Search:
    """States by number of steps spent and grid point: the best found so far, and from where.

    Call `i` is the one whose latent at a grid point has `i` steps spent on it.
    """

    def __init__(self, trajectories: Trajectories, count: int) -> None:
        self.trajectories, self.count, self.steps = trajectories, count, trajectories.num_steps
        self.error = np.full((count + 1, self.steps + 1), np.inf)
        self.error[0, 0] = 0.0
        self.source = np.full((count + 1, self.steps + 1), -1)
        self.state: dict[tuple[int, int], torch.Tensor] = {}

    def step(self, node: int, asked: list[Asked]) -> list[torch.Tensor]:
        """From the outputs at a grid point for each number spent, what each call's latent is at the next."""
        sigmas, positions = self.trajectories.sigmas, torch.from_numpy(self.trajectories.positions)
        for spent, one in enumerate(asked):
            if not np.isfinite(self.error[spent, node]):
                continue  # no state is here with so many steps spent
            x = one.latent.float()
            for later in range(node + 1, self.steps + 1):
                reached = x + float(sigmas[later] - sigmas[node]) * one.output.float()
                wanted = self.trajectories.latents[:, later]
                error = float(np.linalg.norm(reached.flatten(1)[:, positions].cpu().numpy() - wanted, axis=1).mean())
                if error < self.error[spent + 1, later]:
                    self.error[spent + 1, later], self.source[spent + 1, later] = error, node
                    self.state[spent + 1, later] = reached
        return [self.state.pop((spent, node + 1), one.latent) for spent, one in enumerate(asked)]

    def mask(self) -> Mask:
        """The grid that ends nearest to the uncached samples."""
        nodes, at = [], self.steps
        for spent in range(self.count, 0, -1):
            at = int(self.source[spent, at])
            nodes.append(at)
        return tuple(step in nodes for step in range(self.steps))
