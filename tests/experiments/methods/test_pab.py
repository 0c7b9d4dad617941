"""Pyramid Attention Broadcast keeps the branches apart."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import (
    PyramidAttentionBroadcastConfig,
)

from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.experiments.methods.layers import wan_cost
from tests.pipelines import CALL, build_pipe, run


def test_attention_broadcast_keeps_the_branches_apart():
    """Self-attention at every second step, in both branches. Mutant: one state, so cond is computed every time."""
    pipe = build_pipe()
    costs = forward_costs(pipe, CALL)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    with diffusers_cache(pipe, config, costs) as trace:
        first = run(pipe)
        assert torch.equal(run(pipe), first)
    rest = 1 - wan_cost(costs, "attn1")
    assert trace.shares["cond"] == trace.shares["uncond"] == pytest.approx([1, rest] * 4)
