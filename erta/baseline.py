"""What a fitted solver has to beat: plain ERTACache at the same budget, as one reads it off recorded trajectories.

Trajectories hold the guided output alone, and that is all that a solver sees. So policy, adjusted grid and rectifier are those of
the guided output, in place of the mean over guidance branches: the plan that `erta.collapse` gives for one branch. No
calibration is needed, and no forward to plan it. To run it costs K forwards a prompt, as any solver does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from erta.collapsing import guided_rectifier
from erta.fitted_scheduler import FittedScheduler
from erta.grid import adjusted_sigmas, step_scale
from erta.policy import budget_mask, sources
from erta.scheduler import has_movable_sigmas, with_grid, write_grid
from erta.solver import WithOffset, linear_solver, reuse_residual
from erta.solver_files import MadeFor
from erta.trajectories import Trajectories


def ertacache_scheduler(scheduler: Any, trajectories: Trajectories, count: int) -> FittedScheduler:
    """ERTACache with all its parts and `count` computed steps, planned on these trajectories, as a solver of K steps.

    Its few numbers are fitted to all prompts, also to those on which it is judged, which flatters it a little. The grid is left
    alone where the scheduler's sigmas cannot be moved. Raises BudgetError for a count that cannot be.
    """
    nominal, takeover = trajectories.sigmas, trajectories.signature["takeover"]
    rel_l1, ratio = residual_changes(trajectories)
    mask = budget_mask(rel_l1, count, takeover)
    grid = with_grid(scheduler, nominal)
    if has_movable_sigmas(grid):
        gaps = [step - source for step, source in enumerate(sources(mask))]
        phi = np.array([step_scale(ratio[i, gap - 1]) if gap else 1.0 for i, gap in enumerate(gaps)], float)
        write_grid(grid, adjusted_sigmas(nominal, mask, phi, takeover))
    axis, shape = trajectories.record["channel_axis"], trajectories.signature["latent_shape"]
    # few positions may miss a channel: then one pair for all
    all_seen = len(np.unique(trajectories.channels)) == shape[axis]
    gain, offset = guided_rectifier(trajectories, mask, by_channel=all_seen)
    predict = WithOffset(reuse_residual, gain, offset)
    solver = linear_solver(grid, mask, nominal, predict, gain.shape[1], {"policy": "threshold"})
    return FittedScheduler(solver, scheduler, MadeFor(channel_axis=axis))


def residual_changes(trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
    """`||r[i - m] - r[i]||_1` over that of r[i] and over that of v[i], r = v - x; mean over prompts, (N, N) at [i, m - 1].

    As `Calibration` has them, with a window of all steps. NaN across the step at which a second transformer takes over.
    """
    v = trajectories.outputs
    r = v - trajectories.latents[:, :-1]
    steps, takeover = v.shape[1], trajectories.signature["takeover"]
    rel_l1, ratio = np.zeros((2, steps, steps))
    sizes = [np.maximum(np.abs(value).sum(2), np.finfo(np.float32).tiny) for value in (r, v)]
    for gap in range(1, steps):
        change = np.abs(r[:, gap:] - r[:, :-gap]).sum(2)
        rel_l1[gap:, gap - 1], ratio[gap:, gap - 1] = ((change / size[:, gap:]).mean(0) for size in sizes)
    if takeover is not None:
        for step in range(takeover, steps):
            rel_l1[step, step - takeover :] = ratio[step, step - takeover :] = np.nan
    return rel_l1, ratio
