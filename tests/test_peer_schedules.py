"""Searched schedules: against brute force, by hand, and through the harness."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

import erta
from experiments.peers.budcache import anneal
from experiments.peers.gcache import edge_costs
from experiments.peers.lemica import cost_matrix
from experiments.peers.paths import best_path
from tests.test_cli import command, folders, weights  # noqa: F401


def edges_of(mask):
    nodes = [*(k for k, on in enumerate(mask) if on), len(mask)]
    return list(itertools.pairwise(nodes))


def every_mask(num_steps, count):
    for chosen in itertools.combinations(range(1, num_steps), count - 1):
        yield tuple(k == 0 or k in chosen for k in range(num_steps))


@pytest.mark.parametrize("minimax", [False, True])
def test_paths_against_all_masks(minimax):
    """Mutants: the end's edge left out, one edge more or less, the sum for the sorted list."""
    cost = np.random.default_rng(0).random((8, 9))

    def total(mask):
        spent = [cost[edge] for edge in edges_of(mask)]
        return tuple(sorted(spent, reverse=True)) if minimax else sum(spent)

    for count in (1, 3, 6, 8):
        assert best_path(cost, count, minimax) == min(every_mask(8, count), key=total)


def test_minimax_by_hand():
    """Edges of 5 (0 → 2) and 4 (1 → 3): the smaller worst one is taken, {0, 1}. What was not measured is never taken."""
    edges = [[0, 2, 5.0], [1, 3, 4.0], [0, 3, 9.0]]
    cost = cost_matrix(edges, 3)
    assert best_path(cost, 2, minimax=True) == (True, True, False)  # 0 → 1 → 3: worst 4
    assert best_path(cost, 1) == (True, False, False) and best_path(cost, 3) == (True, True, True)
    with pytest.raises(erta.BudgetError, match="what can be: 2 to 4"):
        best_path(cost_matrix([[0, 2, 1.0], [2, 4, 1.0]], 4), 1)


def test_annealing_finds_the_best_mask():
    """10 steps, 5 computed, the first one (30 % of 5) fixed; the error counts steps that are not 0, 2, 3, 7, 9.

    Mutants: the prefix exchanged too, the last mask returned in place of the best, the budget not kept.
    """
    seen = []

    def error(mask):
        seen.append(mask)
        return float(sum(on != (k in (0, 2, 3, 7, 9)) for k, on in enumerate(mask)))

    mask, value = anneal(error, 10, 5, 200, seed=0)
    assert value == 0 and [k for k, on in enumerate(mask) if on] == [0, 2, 3, 7, 9]
    assert all(sum(tried) == 5 and tried[0] for tried in seen) and len(set(seen)) == len(seen)
    assert anneal(error, 10, 10, 5, 0)[0] == (True,) * 10


def test_gcache_edges_by_hand():
    """|r_i - r_k| = k - i, 4 steps, w = 3 t (Bernstein coefficients 0, 1, 2, 3): weights e^0, e^1, e^2, e^3.

    0 → 2 reuses step 1: 1 e; 0 → 4 reuses 1, 2, 3: e + 2 e² + 3 e³; 2 → 4 reuses 3: e³.
    Mutants: the weight of the source's time, the step computed next counted too, the polynomial's powers.
    """
    change = np.abs(np.arange(4)[:, None] - np.arange(4)).astype(float)
    cost, e = edge_costs(change, np.array([0.0, 1.0, 2.0, 3.0])), np.e
    assert cost[0, 2] == pytest.approx(e) and cost[2, 4] == pytest.approx(e**3)
    assert cost[0, 4] == pytest.approx(e + 2 * e**2 + 3 * e**3) and cost[1, 2] == 0
    assert best_path(cost, 2) == (True, False, False, True)  # e + 2 e² is less than what any other leaves


PEERS = {"gcache": ["cache.options.trials=2"], "lemica": [], "budcache": ["cache.options.iterations=3"]}


@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Exactly the budget, as a plan, whose file is written."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=3", *PEERS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    assert record["steps"]["computed"] == 3 == sum(plan["steps"]["mask"]) and record["timing"]["forwards"] == 6
    assert plan["report"]["policy"] == cache and record["metrics"]["psnr_db"] > 0
