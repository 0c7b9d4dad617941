"""MagCache, by hand and against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import MagCacheConfig

import erta
from erta.online import Call, online
from experiments.methods import magcache
from experiments.methods.common.counting import diffusers_cache
from experiments.methods.magcache import MagCache
from experiments.models.costs import forward_costs
from tests.experiments.methods.layers import reuse_share
from tests.experiments.methods.rules import decisions
from tests.pipelines import (
    CALL,
    build_pipe,
    run,
)


def test_magcache_agrees_with_diffusers():
    """With one list for both branches: the same steps, the same latents, and the same forwards, counted in two ways.

    Mutant: embeddings and head of reused steps not charged.
    """
    pipe = build_pipe()
    costs, share = forward_costs(pipe, CALL), reuse_share(pipe, CALL)
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


RATIOS = [1.0, 1.0, 0.9, 1.0, 1.0, 0.8, 0.9, 1.1]


def test_magcache_by_hand():
    """8 steps, retention 0.25, delta 0.35, at most 2 in a row; ratios as above.

    steps 0, 1: retention                   step 2: R = 0.9, E = 0.1, k = 1: reused
    step 3: R = 0.9, E = 0.2, k = 2: reused step 4: k = 3: computed, R, E, k anew
    step 5: R = 0.8, E = 0.2: reused        step 6: R = 0.72, E = 0.48 > 0.35: computed
    step 7: R = 1.1, E = 0.1: reused (the last step is not forced)

    Mutants: the step's ratio in place of the product (step 6 reused), k or E not cleared, the branches' lists swapped.
    """
    calm = [1.0] * 8
    rule = MagCache(0.35, 2, 0.25, {"cond": RATIOS, "uncond": calm})
    made = decisions(rule, range(8), lambda *_: 1.0, ("cond", "uncond"))
    assert made["cond"] == [True, True, False, False, True, False, True, False]
    assert made["uncond"] == [True, True, False, False, True, False, False, True]
    with pytest.raises(erta.ErtaError, match="for 8 steps, not 6"):
        rule.begin(6)


def test_magcache_ratios():
    """Norms over the last axis are (5, 10), then (10, 10), then (5, 30): ratios 1, (2 + 1) / 2, (0.5 + 3) / 2."""
    recorder = magcache.RatioRecorder()
    recorder.begin(3)
    shape = torch.tensor([0.6, 0.8])
    for step, sizes in enumerate([(5, 10), (10, 10), (5, 30)]):
        residual = torch.tensor(sizes, dtype=torch.float32)[None, :, None] * shape
        recorder.computed(Call(step, 3, "cond", residual, torch.nn.Identity()), residual, residual)
    assert recorder.ratios["cond"] == pytest.approx([1, 1.5, 1.75])
