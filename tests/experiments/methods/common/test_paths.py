"""Searched schedules: against brute force, by hand, and through the harness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments.methods.common.paths import best_path


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
