"""The search over nodes: a shortest path, and moves of single nodes."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from erta.nodes import LocalErrors, climbed, plan_nodes


def test_nodes_are_the_shortest_path():
    """Against every path there is, with errors that depend on the node before. Mutants: the last edge left out, h ignored."""
    table = np.random.default_rng(1).random((8, 8, 8))
    h, i, j = np.indices(table.shape)
    errors = LocalErrors(np.where((j > i) & ((h < i) | (h == i) & (i == 0)), table, np.inf))
    for count in (1, 2, 4, 7):

        def cost(nodes: tuple[int, ...]) -> float:
            path = (0, *nodes, 7)
            return sum(errors.at[path[max(0, k - 1)], path[k], path[k + 1]] for k in range(len(nodes) + 1))

        found = plan_nodes(errors, count)
        best = min(combinations(range(1, 7), count - 1), key=cost)
        assert found == (0, *best)
    assert 3 in plan_nodes(errors, 2, takeover=3)
    heavy = np.where(np.arange(7) < 3, 1e6, 1.0)
    assert plan_nodes(errors, 4, weights=heavy) != plan_nodes(errors, 4)


def test_nodes_climb():
    """To the only top there is, one move at a time. Mutants: worse nodes kept, step 0 moved, a score asked for twice."""
    wanted, asked = (0, 5, 9, 14), []

    def score(nodes: tuple[int, ...]) -> float:
        asked.append(nodes)
        return -sum(abs(a - b) for a, b in zip(nodes, wanted, strict=True))

    assert climbed((0, 1, 2, 3), 16, score, 400) == wanted
    assert len(asked) == len(set(asked)) and all(nodes[0] == 0 and nodes[-1] < 16 for nodes in asked)
    assert 5 in climbed((0, 5, 7), 16, lambda nodes: float(sum(nodes)), 200, takeover=5)
    assert climbed((0,), 8, lambda nodes: 0.0, 5) == (0,)
