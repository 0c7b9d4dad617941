"""At which steps a solver runs the transformer: a shortest path over the local error of a fitted step.

The local error of going from step i to step j, with the computed step h before, is what is left when `x[j] - x[i]` of uncached
trajectories is fitted by `v[i]` and `v[i] - v[h]`. All of it is read off one Gram matrix of what was recorded, so no model is
called, whatever the budget. Norms are summed, not their squares: the errors of a run's steps add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from erta.errors import BudgetError, ErtaError, choice_index
from erta.options import OVER_PROMPTS, PLACEMENTS
from erta.policy import uniform_mask
from erta.trajectories import Trajectories

WINDOW = 12
Nodes = tuple[int, ...]
NOTHING = 1e-12  # of a diagonal: features below it count as none


def gram(latents: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Products of all recorded vectors, float64 (P, 2N + 1, 2N + 1), in the order x[0] … x[N], v[0] … v[N-1].

    Each prompt's are divided by its mean squared latent, so that prompts count alike. `latents` (P, N + 1, M), `outputs`
    (P, N, M).
    """
    both = np.concatenate([latents, outputs], axis=1).astype(np.float64)
    products = both @ both.transpose(0, 2, 1)
    size = np.mean(np.sum(latents.astype(np.float64) ** 2, axis=2), axis=1)
    return products / size[:, None, None]


@dataclass(frozen=True)
class LocalErrors:
    """`at[h, i, j]`: relative L2 error of a step from i to j after h, (N + 1, N + 1, N + 1); infinite where there is none.

    Where i = 0 there is no step before, and h = 0.
    """

    at: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.at) - 1


def local_errors(products: np.ndarray, window: int = WINDOW, over_prompts: str = "mean") -> LocalErrors:
    """Local errors from the Gram matrices of prompts (P, 2N + 1, 2N + 1), for steps no more than `window` apart.

    Args:
        over_prompts: `mean` of the prompts' squared errors under the root, or the `worst` prompt's. The fit is one for all of them.
    """
    choice_index("over_prompts", over_prompts, OVER_PROMPTS)
    steps = (products.shape[1] - 1) // 2
    errors = np.full((steps + 1,) * 3, np.inf)
    for i in range(steps):
        v = steps + 1 + i
        for j in range(i + 1, min(steps, i + window) + 1):
            # in the basis (x_j - x_i, v_i, v_i - v_h): few vectors, so their products are put together from the matrix
            for h in range(max(0, i - window), i) if i else (0,):
                rows = np.zeros((3 if i else 2, products.shape[1]))
                rows[0, [j, i]], rows[1, v] = (1, -1), 1
                if i:
                    rows[2, [v, steps + 1 + h]] = 1, -1
                used = np.flatnonzero(rows.any(axis=0))
                small = rows[:, used] @ products[:, used[:, None], used] @ rows[:, used].T
                errors[h, i, j] = _residual(small, over_prompts)
    return LocalErrors(errors)


def _residual(products: np.ndarray, over_prompts: str) -> float:
    """What is left of the first vector when the others fit it, with one set of coefficients; products (P, f + 1, f + 1)."""
    total = products.sum(axis=0)
    features = total[1:, 1:] + np.diag(NOTHING * np.diag(total)[1:] + np.finfo(float).tiny)
    solution = np.linalg.solve(features, total[1:, 0])
    left = np.concatenate([[1.0], -solution])
    by_prompt = np.maximum(np.einsum("a,pab,b->p", left, products, left), 0)
    return float(np.sqrt(by_prompt.mean() if over_prompts == "mean" else by_prompt.max()))


def plan_nodes(
    errors: LocalErrors, count: int, weights: np.ndarray | None = None, takeover: int | None = None
) -> Nodes:
    """The `count` nodes, from step 0 on, whose summed local errors are smallest.

    Args:
        weights: of an error that is there after each step of the grid, (N,); None: even. Some let it count by how it grows.
        takeover: a step that must be a node, since a second transformer takes over there.

    Raises BudgetError for a count that there are no paths of.
    """
    steps = errors.num_steps
    cost = errors.at[:, :steps].copy()
    if weights is not None:
        cost[:, :, 1:] *= np.asarray(weights, float)  # an error of a step to j is there after step j - 1
    if takeover is not None and 0 < takeover < steps:
        cost[:, :takeover, takeover + 1 :] = np.inf
    best = np.full((steps + 1, steps + 1), np.inf)  # over (the node before, the present one)
    best[0, 0] = 0.0
    came_from = []
    for _ in range(count):
        # to (i, j) from (h, i): the h that costs least
        through = best[:, :steps, None] + cost
        origin = through.argmin(axis=0)
        following = np.full_like(best, np.inf)
        following[:steps] = np.take_along_axis(through, origin[None], axis=0)[0]
        came_from.append(origin)
        best = following
    last = int(best[:, steps].argmin())
    if not np.isfinite(best[last, steps]):
        raise BudgetError(
            f"no path of {count} nodes spans {steps} steps, {'with the second transformer, ' if takeover else ''}within the window of "
            "the local errors: ask for more steps, or for a larger window"
        )
    nodes, present, following_node = [], last, steps
    for origin in reversed(came_from):
        nodes.append(present)
        present, following_node = int(origin[present, following_node]), present
    return tuple(reversed(nodes))


def nodes_for(
    trajectories: Trajectories, count: int, over_prompts: str = "mean", weights: Sequence[float] | None = None
) -> Nodes:
    """The planned nodes for `count` steps of recorded trajectories. `weights`: see `plan_nodes`.

    Raises BudgetError for a count that cannot be, ErtaError for weights that are not one positive number a step.
    """
    steps, takeover = trajectories.num_steps, trajectories.signature["takeover"]
    given = None if weights is None else np.asarray(weights, float)
    if given is not None and (given.shape != (steps,) or not ((given > 0) & np.isfinite(given)).all()):
        raise ErtaError(f"step_weights must be {steps} positive numbers, one for each step of the grid")
    if not 1 <= count <= steps:
        raise BudgetError(f"a solver for a grid of {steps} steps has 1 to {steps} steps of its own, not {count}")
    window = max(WINDOW, 3 * -(-steps // count))
    errors = local_errors(gram(trajectories.latents, trajectories.outputs), window, over_prompts)
    return plan_nodes(errors, count, given, takeover)


def placed_nodes(
    trajectories: Trajectories,
    count: int,
    placement: str = "best",
    over_prompts: str = "mean",
    weights: Sequence[float] | None = None,
) -> dict[str, Nodes]:
    """By placement, the nodes for `count` steps: `planned`, spread `even`ly, or for `best` both, if they differ.

    The planner adds up local errors, and knows neither how an error grows nor what later steps undo. On a grid of few steps a
    single step decides: one that ends at the next step of the grid is exact under Euler, and pays for a long one before it.
    """
    choice_index("placement", placement, PLACEMENTS)
    planned = nodes_for(trajectories, count, over_prompts, weights)
    mask = uniform_mask(trajectories.num_steps, count, trajectories.signature["takeover"])
    found = {"planned": planned, "even": tuple(step for step, computed in enumerate(mask) if computed)}
    if placement != "best":
        return {placement: found[placement]}
    return found if found["planned"] != found["even"] else {"planned": planned}


def climbed(
    nodes: Nodes, num_steps: int, score: Callable[[Nodes], float], trials: int, takeover: int | None = None
) -> Nodes:
    """The best nodes that `trials` moves find: one node at a time, by up to three steps, kept where the score grows."""
    rng, best = np.random.default_rng(0), (score(nodes), nodes)
    tried = {nodes}
    for _ in range(trials if len(nodes) > 1 else 0):
        moved = list(best[1])
        moved[rng.integers(1, len(moved))] += int(rng.choice([-3, -2, -1, 1, 2, 3]))
        found = tuple(moved)
        ascends = all(a < b for a, b in pairwise((*found, num_steps)))
        if found in tried or not ascends or (takeover in nodes and takeover not in found):
            continue
        tried.add(found)
        best = max(best, (score(found), found))
    return best[1]
