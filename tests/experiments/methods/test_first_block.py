"""FirstBlockCache runs the first block only."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
)

from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.experiments.methods.layers import wan_cost
from tests.pipelines import CALL, build_pipe, run


def test_first_block_runs_the_first_block_only():
    pipe = build_pipe()
    before, costs = run(pipe), forward_costs(pipe, CALL)
    with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=1e9), costs) as trace:
        run(pipe)
    assert trace.shares["uncond"] == pytest.approx([1] + [1 - wan_cost(costs, "blocks.1.")] * 7)
    with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=0), costs) as trace:
        assert torch.equal(run(pipe), before)
    assert trace.summary().startswith("did not reuse anything")
