"""Caches of diffusers and of single modules: what they compute is counted, and they come off without a trace."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.pipelines import CALL, build_pipe, run


def test_layers_get_their_own_forward_back():
    """Also after an exception, and where somebody else (accelerate) had put one. Mutants: left on, or thrown away."""
    pipe = build_pipe()
    before, costs = run(pipe), forward_costs(pipe, CALL)
    layer = pipe.transformer.blocks[0].ffn.net[0].proj
    other = layer.__dict__["forward"] = lambda *args: type(layer).forward(layer, *args)
    with pytest.raises(ZeroDivisionError), diffusers_cache(pipe, FirstBlockCacheConfig(threshold=1e9), costs):
        run(pipe, callback_on_step_end=lambda *_: 1 / 0)
    assert layer.__dict__.pop("forward") is other
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())
    assert torch.equal(run(pipe), before)
