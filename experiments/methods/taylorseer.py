"""TaylorSeer, as diffusers ships it."""

from __future__ import annotations

from typing import Any

from diffusers.hooks import (
    TaylorSeerCacheConfig,
)
from omegaconf import DictConfig

from erta.pipeline import find_denoiser
from erta.site import model_name
from experiments.harness.arm import Arm, GetCalibration
from experiments.methods.common.diffusers_caches import known_modules, shipped_arm
from experiments.methods.common.knob import Knob, check_number
from experiments.methods.common.modules import COMPONENTS, UNREAD

# as TaylorSeer forecasts them; diffusers' default matches none of Wan's
TAYLOR_CACHED = {model: list(kinds.values()) for model, kinds in COMPONENTS.items()}


TAYLOR_SKIPPED = {model: list(kinds.values()) for model, kinds in UNREAD.items()}


def arm(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """TaylorSeer (Liu et al., 2025, arXiv 2503.06923): attention and feed-forward outputs are forecast between full steps.

    Site: the outputs of attention and feed-forward modules. Stored: each one's last value and its differences up to
    `order`, in each guidance branch. Static: after the warm-up everything is computed at every `interval`-th step. Where we
    differ: it is diffusers' own, with our patterns of modules (its default matches none of Wan's); factors are kept in the
    model's dtype, not always in bfloat16.
    """
    transformer = find_denoiser(pipe)
    cached = known_modules(cfg, transformer, TAYLOR_CACHED)

    def config(interval: int, order: int, warmup: int) -> TaylorSeerCacheConfig:
        return TaylorSeerCacheConfig(
            cache_interval=check_number("interval", interval, 1, whole=True),
            max_order=check_number("order", order, 0, whole=True),
            disable_cache_before_step=check_number("warmup", warmup, 1, whole=True),
            taylor_factors_dtype=transformer.dtype,
            cache_identifiers=cached,
            skip_predict_identifiers=TAYLOR_SKIPPED.get(model_name(transformer)),
        )

    return shipped_arm(cfg, pipe, Knob("interval", 1, cfg.model.num_inference_steps, whole=True), config)
