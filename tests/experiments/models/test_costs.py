"""What a forward costs, and what a step reused at the blocks runs of it."""

from __future__ import annotations

import pytest
from diffusers.hooks import MagCacheConfig

from experiments.harness.arm import make_arm
from experiments.harness.setup import Setup
from experiments.methods.common.counting import diffusers_cache
from experiments.models.costs import forward_costs
from tests.commands import config
from tests.experiments.methods.layers import reuse_share
from tests.pipelines import CALL, FLUX_CALL, WAN_CALL, build_flux, build_pipe, build_two, generate


def test_forward_costs_by_hand():
    """Attention of L tokens of width d: 4 L² d for its products beside 2 L d² for each projection."""
    pipe, tokens = build_pipe(), []
    projection = pipe.transformer.blocks[0].attn1.to_q
    handle = projection.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:2].numel()))
    costs = forward_costs(pipe, CALL)
    handle.remove()
    length, width = tokens[0], projection.in_features
    assert sum(costs.values()) == pytest.approx(1)
    ratio = costs["blocks.0.attn1.to_q"] / costs["blocks.0.attn1.to_k"]
    assert ratio == pytest.approx((2 * length * width**2 + 4 * length**2 * width) / (2 * length * width**2))
    assert costs["blocks.0.ffn.net.0.proj"] == pytest.approx(2 * costs["blocks.1.attn1.to_v"])  # ffn_dim = 2 d


@pytest.mark.parametrize(("build", "call"), [(build_pipe, WAN_CALL), (build_flux, FLUX_CALL)])
def test_a_reused_step_at_blocks_runs_embeddings_and_head(build, call):
    """Counted once more by what a cache of diffusers runs at such a step. Mutants: nothing charged; block 0 as well."""
    pipe = build()
    share, costs = reuse_share(pipe, call), forward_costs(pipe, call)
    config = MagCacheConfig(
        threshold=1e9, max_skip_steps=99, retention_ratio=0.2, num_inference_steps=6, mag_ratios=[1.0] * 6
    )
    with diffusers_cache(pipe, config, costs) as trace:
        generate(pipe, call)
    (least,) = {round(min(shares), 9) for shares in trace.shares.values()}
    assert share == pytest.approx(least) and 0 < share < 1


def test_either_of_two_transformers_can_be_asked():
    """Both of Wan 2.2's have the share of the one alone. Mutant: the second asked for, the first counted."""
    pipe, one = build_two(), reuse_share(build_pipe(), CALL)
    assert [reuse_share(pipe, CALL, stage) for stage in (0, 1)] == pytest.approx([one, one])
    pipe.transformer.blocks = pipe.transformer.blocks[:1]
    assert reuse_share(pipe, CALL, 0) > one == pytest.approx(reuse_share(pipe, CALL, 1))


def test_a_plan_at_blocks_is_charged():
    """cache=uniform at 3 of 6 steps. Mutants: computed steps alone; a share at the output."""
    pipe, forwards = build_pipe(), {}
    shape = [f"model.{key}={value}" for key, value in WAN_CALL.items()]
    for site in ("output", "blocks"):
        cfg = config("cache=uniform", "cache.steps=3", f"cache.site={site}", *shape)
        setup = Setup(cfg, pipe)
        arm = make_arm(setup)
        assert setup.reuse_share() == (0 if site == "output" else reuse_share(pipe, WAN_CALL))
        with arm.put_on(pipe) as trace:
            generate(pipe, WAN_CALL)
        forwards[site] = trace.forwards["cond"]
    assert forwards == {"output": 3, "blocks": pytest.approx(3 + 3 * reuse_share(pipe, WAN_CALL))}
