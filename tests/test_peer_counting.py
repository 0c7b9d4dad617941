"""Caches of diffusers and of single modules: what they compute is counted, and they come off without a trace."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

import erta
from erta.online import online
from experiments.methods import make_arm
from experiments.peers import calibrated, shipped
from experiments.peers.counting import diffusers_cache, forward_costs, reuse_share
from experiments.peers.magcache import MagCache
from experiments.peers.modules import components_of, every, module_cache
from experiments.peers.shipped import TAYLOR_CACHED, TAYLOR_SKIPPED
from tests.conftest import CALL, build_pipe, run
from tests.test_models import config
from tests.test_peers import RATIOS, Scripted
from tests.test_sites import FLUX_CALL, WAN_CALL, build_flux, generate
from tests.test_two_transformers import build_two


def test_magcache_agrees_with_diffusers():
    """With one list for both branches: the same steps, the same latents, and the same forwards, counted in two ways.

    Mutant: embeddings and head of reused steps not charged.
    """
    pipe = build_pipe()
    costs, share = forward_costs(pipe, CALL), reuse_share("blocks", pipe, CALL)
    rule = MagCache(0.35, 2, 0.25, {"cond": RATIOS, "uncond": RATIOS})
    with online(pipe, rule, "blocks", reuse_share=share) as ours:
        expected = run(pipe)
    config = MagCacheConfig(
        threshold=0.35, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=8, mag_ratios=RATIOS
    )
    with diffusers_cache(pipe, config, costs) as theirs:
        found = run(pipe)
    assert theirs.forwards == pytest.approx(ours.forwards) and 0 < share < 0.5
    assert theirs.executed == ours.executed and not all(computed for _, computed in ours.executed["cond"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert theirs.cache_bytes >= ours.cache_bytes > 0


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


def wan_cost(costs, *parts: str) -> float:
    return sum(cost for name, cost in costs.items() if any(part in name for part in parts))


def test_taylorseer_is_counted_and_taken_off():
    """Steps 0 to 2, 4 and 7 in full; at the others what is outside attention and feed-forward is still computed.

    Mutants: calls of hooked modules counted as computed, identifiers that match nothing passed over in silence.
    """
    pipe = build_pipe()
    before, costs, own = run(pipe), forward_costs(pipe, CALL), pipe.scheduler
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=3, cache_identifiers=TAYLOR_CACHED["WanTransformer3DModel"]
    )
    with diffusers_cache(pipe, config, costs) as trace:
        cached = run(pipe)
        assert torch.equal(run(pipe), cached)
        with pytest.raises(erta.InstallError, match="diffusers' own cache is enabled"):
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


def test_first_block_runs_the_first_block_only():
    pipe = build_pipe()
    before, costs = run(pipe), forward_costs(pipe, CALL)
    with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=1e9), costs) as trace:
        run(pipe)
    assert trace.shares["uncond"] == pytest.approx([1] + [1 - wan_cost(costs, "blocks.1.")] * 7)
    with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=0), costs) as trace:
        assert torch.equal(run(pipe), before)
    assert trace.summary().startswith("did not reuse anything")


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


@pytest.mark.parametrize(("build", "call"), [(build_pipe, WAN_CALL), (build_flux, FLUX_CALL)])
def test_fastercache_extrapolates_self_attention(build, call):
    """Self-attention is left out at every second step below the timestep, in each branch by its own two outputs.

    Mutants: identifiers that match nothing, one state for both branches, cross-attention left out as well.
    """
    pipe = build()
    before, costs = generate(pipe, call), forward_costs(pipe, call)
    transformer = pipe.transformer
    patterns = shipped.FASTER_CACHED[type(transformer).__name__]
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


def test_seacache_decides_by_step():
    """Without a limit on the change, at most two in a row: steps 0, 3, 6 and the last. And FLUX is refused."""
    pipe = build_pipe()
    costs = forward_costs(pipe, CALL)
    with diffusers_cache(pipe, SeaCacheConfig(threshold=1e9, residual_order=0), costs) as trace:
        run(pipe)
    for branch in ("cond", "uncond"):
        assert [computed for _, computed in trace.executed[branch]] == [k in (0, 3, 6, 7) for k in range(8)]
    with pytest.raises(erta.ErtaError, match="would compute everything"):
        shipped.seacache(None, build_flux(), None)


def of_layers(pipe, costs, pattern: str) -> float:
    """The share of all layers in modules of these names."""
    return sum(cost for name, cost in costs.items() if re.match(pattern, name))


FLUX_BRANCHES = (
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)\.|single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)"
)
FULL = [True, False, False, True, False, False]


@pytest.mark.parametrize("build", [build_pipe, build_flux])
def test_fora_by_hand(build):
    """Interval 3 of 6 steps: steps 0 and 3 in full; at 1, 2 and 4, 5 every module gives what it gave then, uncomputed.

    Mutants: FLUX's layers charged where a hook answers for them (its projections are hooked themselves), attention
    and feed-forward run whose projection is not, the output of the step before last.
    """
    pipe, call = build(), WAN_CALL if build is build_pipe else FLUX_CALL
    costs, given = forward_costs(pipe, call), {}
    kinds = components_of(pipe.transformer)
    with module_cache(pipe, dict.fromkeys(kinds, every(3, 6)), costs) as trace:
        handles = [
            module.register_forward_hook(lambda module, args, made: given.setdefault(module, []).append(made))
            for modules in kinds.values()
            for module in modules
        ]
        made = generate(pipe, call)
        for handle in handles:
            handle.remove()
    kept = r"blocks\.\d+\.(attn1|attn2|ffn)\." if build is build_pipe else FLUX_BRANCHES
    rest = 1 - of_layers(pipe, costs, kept)
    assert 0 < rest < 0.4
    for shares in trace.shares.values():
        assert shares == pytest.approx([1 if full else rest for full in FULL])
    branches = len(trace.shares)
    for outputs in given.values():
        for step in (1, 2, 4, 5):
            for branch in range(branches):
                assert outputs[step * branches + branch] is outputs[step // 3 * 3 * branches + branch]
    assert torch.isfinite(made).all() and not any("forward" in m.__dict__ for m in pipe.transformer.modules())


def test_taylorseer_on_flux():
    """The same layers as FORA's are left out at steps 3 and 5. Mutant: projections charged where they are forecast."""
    pipe = build_flux()
    costs, name = forward_costs(pipe, FLUX_CALL), "FluxTransformer2DModel"
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=3,
        cache_identifiers=TAYLOR_CACHED[name],
        skip_predict_identifiers=TAYLOR_SKIPPED[name],
    )
    with diffusers_cache(pipe, config, costs) as trace:
        generate(pipe, FLUX_CALL)
    rest = 1 - of_layers(pipe, costs, FLUX_BRANCHES)
    assert trace.shares["cond"] == pytest.approx([1, 1, 1, rest, 1, rest])


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


@pytest.mark.parametrize(("build", "call"), [(build_pipe, WAN_CALL), (build_flux, FLUX_CALL)])
def test_a_reused_step_at_blocks_runs_embeddings_and_head(build, call):
    """Counted once more by what a cache of diffusers runs at such a step. Mutants: nothing charged; block 0 as well."""
    pipe = build()
    share, costs = reuse_share("blocks", pipe, call), forward_costs(pipe, call)
    config = MagCacheConfig(
        threshold=1e9, max_skip_steps=99, retention_ratio=0.2, num_inference_steps=6, mag_ratios=[1.0] * 6
    )
    with diffusers_cache(pipe, config, costs) as trace:
        generate(pipe, call)
    (least,) = {round(min(shares), 9) for shares in trace.shares.values()}
    assert share == pytest.approx(least) and 0 < share < 1 and reuse_share("output", pipe, call) == 0


def test_either_of_two_transformers_can_be_asked():
    """Both of Wan 2.2's have the share of the one alone. Mutant: the second asked for, the first counted."""
    pipe, one = build_two(), reuse_share("blocks", build_pipe(), CALL)
    assert [reuse_share("blocks", pipe, CALL, stage) for stage in (0, 1)] == pytest.approx([one, one])
    pipe.transformer.blocks = pipe.transformer.blocks[:1]
    assert reuse_share("blocks", pipe, CALL, 0) > one == pytest.approx(reuse_share("blocks", pipe, CALL, 1))


def test_what_was_counted_otherwise_is_measured_anew(tmp_path, monkeypatch):
    """A kept measurement serves the next run, unless the counting has changed since. Mutant: kept for ever."""
    monkeypatch.chdir(tmp_path)
    cfg, pipe, made = config(*[f"model.{key}={value}" for key, value in CALL.items()]), build_pipe(), []

    def measure():
        made.append({"value": len(made)})
        return made[-1]

    found = [calibrated.kept(cfg, pipe, "m", [1], measure) for _ in range(2)]
    monkeypatch.setattr(calibrated, "COUNTED", calibrated.COUNTED + 1)
    found.append(calibrated.kept(cfg, pipe, "m", [1], measure))
    assert [one["value"] for one in found] == [0, 0, 1]


def test_a_plan_at_blocks_is_charged():
    """cache=uniform at 3 of 6 steps. Mutants: computed steps alone; a share at the output."""
    pipe, forwards = build_pipe(), {}
    shape = [f"model.{key}={value}" for key, value in WAN_CALL.items()]
    for site in ("output", "blocks"):
        cfg = config("cache=uniform", "cache.steps=3", f"cache.site={site}", *shape)
        arm = make_arm(cfg, pipe, lambda: None)
        with arm.put_on(pipe) as trace:
            generate(pipe, WAN_CALL)
        forwards[site] = trace.forwards["cond"]
    assert forwards == {"output": 3, "blocks": pytest.approx(3 + 3 * reuse_share("blocks", pipe, WAN_CALL))}


@pytest.mark.parametrize("window", [[0.15, 0.9], [0, 1], [0.32, 1.0]])
def test_a_window_is_of_steps(window):
    """8 steps on Wan's shifted grid. Mutants: shares of the timesteps, the steps' bounds in- or exclusive the other way."""
    pipe = build_pipe()
    shape = [f"model.{key}={value}" for key, value in CALL.items()]
    cfg = config("cache=pab", f"cache.options.window={window}", *shape)
    low, high = shipped.timesteps_between(cfg, pipe)
    run(pipe)
    inside = [low < int(time) < high for time in pipe.scheduler.timesteps]
    assert inside == [step > 0 and 8 * window[0] <= step < 8 * window[1] for step in range(8)]


@pytest.mark.parametrize("window", ["[0.9,0.1]", "[0.5]", "0.5", "[0,2]", "[a,b]"])
def test_a_window_that_is_none(window):
    shape = [f"model.{key}={value}" for key, value in CALL.items()]
    with pytest.raises(erta.ErtaError, match="must be two shares of the steps"):
        shipped.timesteps_between(config("cache=pab", f"cache.options.window={window}", *shape), build_pipe())
