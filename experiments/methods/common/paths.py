"""Schedules as shortest paths: nodes are steps, an edge i → j computes step i and then, at the earliest, step j.

A schedule of K computed steps is a path of K edges from step 0 to the end N. Its cost is the sum of its edges'
costs, or, as LeMiCa has it, the sorted list of them from the worst on.
"""

from __future__ import annotations

import numpy as np

from erta.errors import BudgetError
from erta.policy import Mask


def best_path(cost: np.ndarray, count: int, minimax: bool = False) -> Mask:
    """The schedule of `count` computed steps with the smallest cost.

    Args:
        cost: of edges, (N, N + 1), cost[i, j] for i < j; infinite where an edge is not allowed.
        minimax: compare the worst edge first, then the second worst, and so on, in place of the sum.

    Raises BudgetError if no path has so many edges.
    """
    num_steps = len(cost)
    best: list[dict[int, tuple[tuple[float, ...], tuple[int, ...]]]] = [{} for _ in range(num_steps + 1)]
    best[0][0] = ((), (0,))
    for i in range(num_steps):
        for used, (spent, path) in best[i].items():
            for j in range(i + 1, num_steps + 1):
                if not np.isfinite(cost[i, j]):
                    continue
                edge = float(cost[i, j])
                total = tuple(sorted((*spent, edge), reverse=True)) if minimax else (sum(spent) + edge,)
                known = best[j].get(used + 1)
                if known is None or total < known[0]:
                    best[j][used + 1] = (total, (*path, j))
    if count not in best[num_steps]:
        reached = sorted(best[num_steps])
        what = f"{reached[0]} to {reached[-1]}" if reached else "none"
        raise BudgetError(f"{count} computed steps cannot be met with runs this short; what can be: {what}")
    nodes = set(best[num_steps][count][1])
    return tuple(step in nodes for step in range(num_steps))
