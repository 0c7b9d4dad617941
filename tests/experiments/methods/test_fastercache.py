"""FasterCache's attention half."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
)

from erta.architectures import architecture_of
from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.pipelines import FLUX_CALL, WAN_CALL, build_flux, build_pipe, generate


@pytest.mark.parametrize(("build", "call"), [(build_pipe, WAN_CALL), (build_flux, FLUX_CALL)])
def test_fastercache_extrapolates_self_attention(build, call):
    """Self-attention is left out at every second step below the timestep, in each branch by its own two outputs.

    Mutants: identifiers that match nothing, one state for both branches, cross-attention left out as well.
    """
    pipe = build()
    before, costs = generate(pipe, call), forward_costs(pipe, call)
    transformer = pipe.transformer
    patterns = (architecture_of(transformer).self_attention,)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 999),
        spatial_attention_block_identifiers=patterns,
        temporal_attention_block_identifiers=(),
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    )
    modules = [name for name, _ in transformer.named_modules() if any(re.search(p, name) for p in patterns)]
    assert len(modules) == len([n for n, _ in transformer.named_modules() if n.endswith((".attn1", ".attn"))]) >= 2
    with diffusers_cache(pipe, config, costs) as trace:
        first = generate(pipe, call)
        assert torch.equal(generate(pipe, call), first)
    left = 1 - sum(cost for name, cost in costs.items() if name.startswith(tuple(f"{m}." for m in modules)))
    for shares in trace.shares.values():
        assert shares[0] == pytest.approx(1) and set(np.round(shares, 6)) == {1, round(left, 6)}
    assert not torch.equal(first, before) and trace.cache_bytes > 0
    assert torch.equal(generate(pipe, call), before)
