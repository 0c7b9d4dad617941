"""DBCache of cache-dit: counted here, taken off whole, and the same rule as diffusers' FirstBlockCache."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

from experiments.methods.common.counting import diffusers_cache
from experiments.methods.dbcache import cache_dit_cache, first_blocks
from experiments.models.costs import forward_costs
from tests.commands import folders
from tests.pipelines import FLUX_CALL, MODELS, build_flux, build_pipe, generate

cache_dit = pytest.importorskip("cache_dit")


def config(threshold: float, warmup: int = 1, **options) -> cache_dit.DBCacheConfig:
    return cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=warmup, **options
    )


@pytest.mark.parametrize("model", MODELS)
def test_it_is_counted_and_taken_off(model):
    """Threshold 0: bit-identical. A huge one: after the warm-up only the first block. A second call repeats the first.

    Mutants: the state of the last call kept, the package's patches left on the transformer, its stacks in another order, the middle's layers charged.
    """
    build, call = MODELS[model]
    pipe, steps = build(), call["num_inference_steps"]
    before, costs = generate(pipe, call), forward_costs(pipe, call)
    attributes = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    with cache_dit_cache(pipe, costs, cache_config=config(0.0)) as trace:
        assert torch.equal(generate(pipe, call), before)
    assert trace.summary().startswith("did not reuse anything")
    with cache_dit_cache(pipe, costs, cache_config=config(1e3, warmup=4)) as trace:
        first = generate(pipe, call)
        assert torch.equal(generate(pipe, call), first)
    middle = "blocks.1." if model == "wan" else "single_transformer_blocks."  # of FLUX's, one runs both streams
    left = 1 - sum(cost for name, cost in costs.items() if name.startswith(middle))
    assert all(shares == pytest.approx([1] * 4 + [left] * (steps - 4)) for shares in trace.shares.values())
    assert trace.cache_bytes > 0 and not torch.equal(first, before)
    forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    with cache_dit_cache(pipe, costs, cache_config=config(1e3, warmup=4), calibrator_config=forecast) as taylor:
        assert not torch.equal(generate(pipe, call), first)
    assert taylor.cache_bytes > trace.cache_bytes and taylor.forwards == pytest.approx(trace.forwards)
    left = [(name, set(vars(module)) - {"_diffusers_hook"}) for name, module in pipe.transformer.named_modules()]
    assert left == [
        (name, names - {"_diffusers_hook"}) for name, names in attributes.items()
    ]  # in the same order: diffusers finds the first block by it
    assert torch.equal(generate(pipe, call), before)


def test_it_decides_like_the_first_block_cache_of_diffusers():
    """F1B0 without a warm-up is the same rule, on a model with one stack of blocks."""
    pipe, call = build_pipe(), MODELS["wan"][1]
    costs, seen = forward_costs(pipe, call), set()
    for threshold in (0.05, 0.1, 0.2, 0.4, 0.8):
        with diffusers_cache(pipe, FirstBlockCacheConfig(threshold=threshold), costs) as theirs:
            made = generate(pipe, call)
        with cache_dit_cache(pipe, costs, cache_config=config(threshold)) as ours:
            torch.testing.assert_close(generate(pipe, call), made)
        assert ours.executed == theirs.executed
        seen.add(str(ours.executed))
    assert len(seen) > 2  # the thresholds do decide


def test_how_many_blocks_decide():
    assert first_blocks(build_pipe().transformer, None) == 1 and first_blocks(build_flux().transformer, 2) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "first"), [("dbcache", 3), ("dbcache_taylor", 4)])
def test_in_the_harness(command, tmp_path, monkeypatch, cache, first):
    """The budget is met on calibration prompts; a missing package is named."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=5", f"cache.options.warmup={first}")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["plan_report"]["computed"] <= 5.5 and record["timing"]["forwards"] < 12
    assert record["steps"]["without_reuse"] == 0 and record["memory"]["cache_bytes"] > 0
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    code, printed = command(f"cache={cache}", "cache.steps=3")
    assert code == 1 and f"cache={cache} needs the package cache-dit" in printed and ".[peers]" in printed


def test_it_counts_one_forward_a_step():
    """FLUX runs one branch: the package must not take every second step for an unconditional one."""
    pipe = build_flux()
    costs = forward_costs(pipe, FLUX_CALL)
    with cache_dit_cache(pipe, costs, cache_config=config(1e3)) as trace:
        generate(pipe, FLUX_CALL)
    (executed,) = trace.executed.values()
    assert [computed for _, computed in executed] == [True] + [False] * (len(executed) - 1)
