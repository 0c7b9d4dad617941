"""T-GATE's schedule, by hand."""

from __future__ import annotations

from experiments.methods import t_gate


def test_t_gate_by_hand():
    """10 steps, gate 5, warm-up 2; self-attention every 2nd step before the gate, every 3rd after."""
    made = t_gate.masks(10, 5, 2, 2, 3)
    assert [k for k, on in enumerate(made["cross"]) if on] == [0, 1, 2, 3, 4]
    assert [k for k, on in enumerate(made["attention"]) if on] == [0, 1, 2, 4, 5, 8]
