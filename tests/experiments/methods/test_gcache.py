"""GCache's costs, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erta.online import Call
from experiments.methods.common.paths import best_path
from experiments.methods.common.searched import TrajectoryRecorder
from experiments.methods.gcache import edge_costs, residual_change


def test_gcache_changes_by_hand():
    """r = 0, 1, 3 in one branch and 0, 2, 2 in the other: |r_0 - r_2| = (3 + 2) / 2. Mutants: a sum, velocities, x."""
    recorder = TrajectoryRecorder()
    recorder.begin(3)
    x = torch.zeros(1, 2)
    for branch, residuals in {"cond": (0.0, 1.0, 3.0), "uncond": (0.0, 2.0, 2.0)}.items():
        for step, r in enumerate(residuals):
            recorder.computed(Call(step, 3, branch, x + 7 * step, torch.nn.Identity()), x + 9 * step, x + r)
    np.testing.assert_allclose(residual_change(recorder), [[0, 1.5, 2.5], [0, 0, 1.0], [0, 0, 0]])


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
