"""TaylorSeer is counted, and taken off."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import (
    TaylorSeerCacheConfig,
)

import erta
from erta.architectures import ARCHITECTURES
from erta.online import online
from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.erta.test_online import Scripted
from tests.experiments.methods.layers import of_layers, wan_cost
from tests.experiments.methods.test_fora import FLUX_BRANCHES
from tests.pipelines import CALL, FLUX_CALL, build_flux, build_pipe, generate, run


def test_taylorseer_is_counted_and_taken_off():
    """Steps 0 to 2, 4 and 7 in full; at the others what is outside attention and feed-forward is still computed.

    Mutants: calls of hooked modules counted as computed, identifiers that match nothing passed over in silence.
    """
    pipe = build_pipe()
    before, costs, own = run(pipe), forward_costs(pipe, CALL), pipe.scheduler
    config = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=3,
        cache_identifiers=list(ARCHITECTURES["WanTransformer3DModel"].components.values()),
    )
    with diffusers_cache(pipe, config, costs) as trace:
        cached = run(pipe)
        assert torch.equal(run(pipe), cached)
        with pytest.raises(erta.InstallError, match="a cache of another library"):
            erta.install(pipe, erta.Plan(mask=(True,) * 8, sigmas=own.sigmas.numpy()))
    rest = 1 - wan_cost(costs, "attn1", "attn2", "ffn")
    for branch in ("cond", "uncond"):
        full = [1, 1, 1, rest, 1, rest, rest, 1]
        assert trace.shares[branch] == pytest.approx(full)
        assert [computed for _, computed in trace.executed[branch]] == [share == 1 for share in full]
    assert sum(trace.forwards.values()) == pytest.approx(10 + 6 * rest) and trace.cache_bytes > 0
    assert not torch.equal(cached, before) and torch.equal(run(pipe), before)
    assert pipe.scheduler is own and not any("forward" in module.__dict__ for module in pipe.transformer.modules())
    with (
        pytest.raises(erta.InstallError, match="matches no module"),
        diffusers_cache(pipe, TaylorSeerCacheConfig(), costs),
    ):
        pass
    assert torch.equal(run(pipe), before)
    with online(pipe, Scripted(2)), pytest.raises(erta.InstallError, match="erta is installed"):
        diffusers_cache(pipe, config, costs).__enter__()


def test_taylorseer_on_flux():
    """The same layers as FORA's are left out at steps 3 and 5. Mutant: projections charged where they are forecast."""
    pipe = build_flux()
    costs, name = forward_costs(pipe, FLUX_CALL), "FluxTransformer2DModel"
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=3,
        cache_identifiers=list(ARCHITECTURES[name].components.values()),
        skip_predict_identifiers=list(ARCHITECTURES[name].unread.values()),
    )
    with diffusers_cache(pipe, config, costs) as trace:
        generate(pipe, FLUX_CALL)
    rest = 1 - of_layers(pipe, costs, FLUX_BRANCHES)
    assert trace.shares["cond"] == pytest.approx([1, 1, 1, rest, 1, rest])
