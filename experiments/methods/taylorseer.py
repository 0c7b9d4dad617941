"""TaylorSeer, as diffusers ships it."""

from __future__ import annotations

from diffusers.hooks import TaylorSeerCacheConfig

from erta.pipeline import find_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm
from experiments.methods.common.knob import Knob, check_number
from experiments.methods.common.modules import known_components


def arm(setup: Setup) -> Arm:
    """TaylorSeer (Liu et al., 2025, arXiv 2503.06923): attention and feed-forward outputs are forecast between full steps.

    Site: the outputs of attention and feed-forward modules. Stored: each one's last value and its differences up to
    `order`, in each guidance branch. Static: after the warm-up everything is computed at every `interval`-th step. Where we
    differ: it is diffusers' own, with our patterns of modules (its default matches none of Wan's); factors are kept in the
    model's dtype, not always in bfloat16.
    """
    transformer = find_denoiser(setup.pipe)
    known = known_components(transformer)

    def config(interval: int, order: int, warmup: int) -> TaylorSeerCacheConfig:
        return TaylorSeerCacheConfig(
            cache_interval=check_number("interval", interval, 1, whole=True),
            max_order=check_number("order", order, 0, whole=True),
            disable_cache_before_step=check_number("warmup", warmup, 1, whole=True),
            taylor_factors_dtype=transformer.dtype,
            cache_identifiers=list(known.components.values()),
            skip_predict_identifiers=list(known.unread.values()) or None,
        )

    return shipped_arm(setup, Knob("interval", 1, setup.cfg.model.num_inference_steps, whole=True), config)
