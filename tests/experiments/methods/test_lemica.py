"""LeMiCa's stretches and its minimax path."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import erta
from experiments.methods import lemica
from experiments.methods.common.paths import best_path
from experiments.methods.lemica import cost_matrix


def test_minimax_by_hand():
    """Edges of 5 (0 → 2) and 4 (1 → 3): the smaller worst one is taken, {0, 1}. What was not measured is never taken."""
    edges = [[0, 2, 5.0], [1, 3, 4.0], [0, 3, 9.0]]
    cost = cost_matrix(edges, 3)
    assert best_path(cost, 2, minimax=True) == (True, True, False)  # 0 → 1 → 3: worst 4
    assert best_path(cost, 1) == (True, False, False) and best_path(cost, 3) == (True, True, True)
    with pytest.raises(erta.BudgetError, match="what can be: 2 to 4"):
        best_path(cost_matrix([[0, 2, 1.0], [2, 4, 1.0]], 4), 1)


def test_lemica_runs_every_stretch_once(monkeypatch):
    """4 steps, stretches of at most 2 reused: steps i + 1 … j - 1, the last stretch to the end; cost: mean |x - x_0|.

    Mutants: the step computed next reused too, stretches one longer, the squared error.
    """
    runs = []

    def run(mask):
        runs.append(mask)
        return torch.full((2, 2), 0.0 if mask is None else float(sum(2**k for k, on in enumerate(mask) if not on)))

    monkeypatch.setattr(lemica, "trial_runs", lambda setup: run)
    setup = SimpleNamespace(cfg=OmegaConf.create({"model": {"num_inference_steps": 4}}))
    edges = lemica.stretch_costs(setup, max_skip=2)
    assert (
        edges == [[0, 2, 2], [0, 3, 2 + 4], [1, 3, 4], [1, 4, 4 + 8], [2, 4, 8]] and runs[0] is None and len(runs) == 6
    )
