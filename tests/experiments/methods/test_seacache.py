"""SeaCache decides by step."""

from __future__ import annotations

import pytest
from diffusers.hooks import (
    SeaCacheConfig,
)

import erta
from experiments.harness.setup import Setup
from experiments.methods import seacache
from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.commands import config
from tests.pipelines import CALL, build_flux, build_pipe, run


def test_seacache_decides_by_step():
    """Without a limit on the change, at most two in a row: steps 0, 3, 6 and the last. And FLUX is refused."""
    pipe = build_pipe()
    costs = forward_costs(pipe, CALL)
    with diffusers_cache(pipe, SeaCacheConfig(threshold=1e9, residual_order=0), costs) as trace:
        run(pipe)
    for branch in ("cond", "uncond"):
        assert [computed for _, computed in trace.executed[branch]] == [k in (0, 3, 6, 7) for k in range(8)]
    with pytest.raises(erta.ErtaError, match="would compute everything"):
        seacache.arm(Setup(config("model=flux_tiny"), build_flux()))
