"""Caches of single modules: schedules by hand, what is left out counted, and their way through the harness."""

from __future__ import annotations

import pytest
import torch

import erta
from experiments.methods import t_gate
from experiments.methods.common.modules import components_of, every, module_cache
from experiments.models.costs import forward_costs
from tests.experiments.methods.layers import wan_cost
from tests.pipelines import CALL, FLUX_CALL, build_flux, build_pipe, generate, run


def test_modules_run_where_the_schedule_says():
    """Feed-forward at steps 0, 3 and 6, cross-attention at step 0, in both branches alike; taken off without a trace.

    Mutants: one output for both guidance branches, cross and self exchanged, state kept between calls.
    """
    pipe = build_pipe()
    before, costs = run(pipe), forward_costs(pipe, CALL)
    with module_cache(pipe, {"mlp": every(1, 8), "cross": every(1, 8)}, costs) as trace:
        assert torch.equal(run(pipe), before)
    assert trace.summary().startswith("did not reuse anything")
    with module_cache(pipe, {"mlp": every(3, 8), "cross": every(8, 8)}, costs) as trace:
        cached = run(pipe)
        assert torch.equal(run(pipe), cached) and not torch.equal(cached, before)
    cross, mlp = wan_cost(costs, "attn2"), wan_cost(costs, "ffn")
    expected = [1 - (k > 0) * cross - (k % 3 > 0) * mlp for k in range(8)]
    assert trace.shares["cond"] == trace.shares["uncond"] == pytest.approx(expected) and trace.cache_bytes > 0
    assert torch.equal(run(pipe), before)
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())


def test_components():
    """Three types on Wan; three on FLUX, whose single blocks project both branches at once. T-GATE is refused there."""
    assert {kind: len(found) for kind, found in components_of(build_pipe().transformer).items()} == {
        "attention": 2,
        "cross": 2,
        "mlp": 2,
    }
    pipe = build_flux()
    before, costs = generate(pipe, FLUX_CALL), forward_costs(pipe, FLUX_CALL)
    with module_cache(pipe, dict.fromkeys(components_of(pipe.transformer), every(2, 6)), costs) as trace:
        assert not torch.equal(generate(pipe, FLUX_CALL), before)
    assert 3 < trace.forwards["cond"] < 4
    with pytest.raises(
        erta.ErtaError,
        match="has no modules of type cross, only attention, mlp, parallel: this method is for WanTransformer3DModel",
    ):
        module_cache(pipe, t_gate.masks(6, 2, 1, 1, 1), costs)
