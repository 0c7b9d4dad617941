"""The caches that diffusers ships, each as an arm: FirstBlockCache, TaylorSeer, MagCache, SeaCache, Pyramid Attention
Broadcast, and FasterCache's attention half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from omegaconf import DictConfig

from erta.errors import ErtaError
from erta.signature import find_denoiser
from erta.site import model_name
from experiments.methods import Arm, GetCalibration
from experiments.models import call_kwargs, call_sigmas
from experiments.peers.counting import diffusers_cache, forward_costs
from experiments.peers.knob import Attach, Knob, check_number, knob_arm, options_of
from experiments.peers.magcache import ratios_of
from experiments.peers.modules import COMPONENTS, UNREAD

TRUNCATED = 0.5  # of a timestep: some solvers keep whole ones, cut off
# as TaylorSeer forecasts them; diffusers' default matches none of Wan's
TAYLOR_CACHED = {model: list(kinds.values()) for model, kinds in COMPONENTS.items()}
TAYLOR_SKIPPED = {model: list(kinds.values()) for model, kinds in UNREAD.items()}
FASTER_CACHED = {
    "WanTransformer3DModel": (r"^blocks\.\d+\.attn1$",),
    "FluxTransformer2DModel": (r"transformer_blocks\.\d+\.attn$",),
}


def shipped_arm(cfg: DictConfig, pipe: Any, knob: Knob, make_config: Callable[..., Any]) -> Arm:
    """A cache of diffusers; `make_config` is called with the YAML file's options, the knob among them."""
    options, costs = options_of(cfg), forward_costs(pipe, call_kwargs(cfg))

    def attach_with(value: float) -> Attach:
        values = {**options, knob.name: check_number(knob.name, value, 0)}
        return lambda pipe: diffusers_cache(pipe, make_config(**values), costs)

    return knob_arm(cfg, pipe, knob, attach_with)


def timesteps_between(cfg: DictConfig, pipe: Any) -> tuple[float, float]:
    """Timesteps, exclusive, between which the steps of `cache.options.window` lie on this pipeline's own grid.

    The window is two shares of the steps; step 0 has nothing to reuse. The papers give timesteps of evenly spaced grids; on
    a shifted one the same timesteps would hold other steps, on Wan hardly any. Raises ErtaError for a window that is none.
    """
    window = options_of(cfg)["window"]
    numbers = isinstance(window, list) and len(window) == 2 and all(isinstance(share, (int, float)) for share in window)
    if not numbers or not 0 <= window[0] < window[1] <= 1:
        raise ErtaError(f"cache.options.window must be two shares of the steps, as [0.15,0.9], not {window}")
    steps, sigmas = cfg.model.num_inference_steps, call_sigmas(pipe, call_kwargs(cfg))
    first, end = max(1, math.ceil(window[0] * steps)), math.ceil(window[1] * steps)  # steps first … end - 1
    between = [float(a + b) / 2 for a, b in itertools.pairwise(sigmas[:-1])]
    edges = [float("inf"), *between, -1.0]  # edges[k] lies before step k
    scale = pipe.scheduler.config.num_train_timesteps
    return scale * edges[end] - TRUNCATED, scale * edges[first] - TRUNCATED


def first_block(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """FirstBlockCache (ParaAttention, chengzeyi/ParaAttention): block 0 is run, its residual's change decides on the others.

    Site: the residual of all blocks but the first. Stored: it, and the first block's output and residual, in each guidance
    branch. Decided online, for each branch, by the relative L1 change of block 0's residual since the last computed step.
    Where we differ: it is diffusers' own; the threshold comes from the budget.
    """
    return shipped_arm(cfg, pipe, Knob("threshold", 1e-4, 1e3), FirstBlockCacheConfig)


def known_modules(cfg: DictConfig, transformer: Any, patterns: dict[str, Any]) -> Any:
    """The patterns of this transformer's modules. Raises ErtaError for one that is not known."""
    name = model_name(transformer)
    if name not in patterns:
        raise ErtaError(f"cache={cfg.cache.name} does not know the modules of {name} (it knows {', '.join(patterns)})")
    return patterns[name]


def taylorseer(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
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


def magcache(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """MagCache (Ma et al., 2025, arXiv 2506.09045) of diffusers: one list of ratios serves all guidance branches.

    Site: the block stack's residual. Stored: one such residual in each guidance branch. Static: the ratios decide, as in
    `peers.magcache`. Where we differ: the list is the mean over branches and 5 calibration prompts.
    """
    ratios = np.mean(list(ratios_of(cfg, pipe).values()), axis=0).tolist()

    def config(delta: float, max_skip: int, retention: float, constants: str) -> MagCacheConfig:
        return MagCacheConfig(
            threshold=delta,
            max_skip_steps=max_skip,
            retention_ratio=retention,
            num_inference_steps=cfg.model.num_inference_steps,
            mag_ratios=ratios,
        )

    made = shipped_arm(cfg, pipe, Knob("delta", 1e-6, 1e3), config)
    made.report["ratios"] = ratios
    return made


def pab(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588): attention is reused, feed-forwards always run.

    Site: the outputs of attention modules. Stored: one such output a module and guidance branch. Static: inside `window`
    they are computed at every so many steps. Where we differ: it is diffusers' own, which keeps one state for all guidance
    branches, so that with separate passes the unconditional one would be given the conditional one's attention; here each
    has its own (see `CountingHook`). The window is the published one of CogVideoX in shares of the steps, not timesteps.
    """

    bounds = timesteps_between(cfg, pipe)

    def config(spatial: int, cross: int | None, window: list[float]) -> PyramidAttentionBroadcastConfig:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=check_number("spatial", spatial, 1, whole=True),
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=bounds,
            cross_attention_timestep_skip_range=bounds,
            current_timestep_callback=lambda: pipe.current_timestep,
        )

    return shipped_arm(cfg, pipe, Knob("spatial", 1, cfg.model.num_inference_steps, whole=True), config)


def fastercache(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """FasterCache (Lv et al., 2024, arXiv 2410.19355), its attention half: self-attention follows its last two outputs.

    Site: the outputs of self-attention modules. Stored: the last two a module and guidance branch. Static: inside `window`
    they are computed at every so many steps. Where we differ: it is diffusers' own; the other half, which foretells the
    unconditional branch by frequencies, wants both branches in one batch. Wan's pipeline runs them one after the other and
    FLUX has none, so there it is left out, as diffusers does for distilled models; each branch keeps its own outputs here.
    The window is CogVideoX's in shares of the steps. Raises ErtaError for other transformers.
    """
    cached, bounds = known_modules(cfg, find_denoiser(pipe), FASTER_CACHED), timesteps_between(cfg, pipe)

    def config(spatial: int, window: list[float], weight: float) -> FasterCacheConfig:
        check_number("weight", weight, 0)
        return FasterCacheConfig(
            spatial_attention_block_skip_range=check_number("spatial", spatial, 1, whole=True),
            spatial_attention_timestep_skip_range=bounds,
            spatial_attention_block_identifiers=cached,
            temporal_attention_block_identifiers=(),
            attention_weight_callback=lambda module: weight,
            current_timestep_callback=lambda: pipe.current_timestep,
            is_guidance_distilled=True,
        )

    return shipped_arm(cfg, pipe, Knob("spatial", 1, cfg.model.num_inference_steps, whole=True), config)


def seacache(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """SeaCache (2026, arXiv 2602.18993): TeaCache's rule on spectrally filtered latents, without a polynomial.

    Site: the block stack's residual. Stored: that residual, the one before for its extrapolation, and the last filtered
    signal, in each guidance branch. Decided online. Where we differ: it is diffusers' own, with no limit on runs of reused
    steps (its default: 2), so that every budget can be reached. Raises ErtaError for other models than Wan text-to-video:
    the hook asks the pipeline for sigma and step, which the others do not give it, and then computes everything; and for a
    diffusers without it.
    """
    try:
        from diffusers.hooks import SeaCacheConfig  # not in the oldest diffusers that the rest runs with
    except ImportError as error:
        raise ErtaError(
            "cache=seacache needs diffusers' SeaCache: pip install 'diffusers>=0.42.1' (make setup does)"
        ) from error

    if model_name(find_denoiser(pipe)) != "WanTransformer3DModel":
        raise ErtaError("cache=seacache runs on Wan text-to-video only: diffusers' SeaCache would compute everything")

    def config(threshold: float, order: int, max_skip: int, first: int, last: int) -> SeaCacheConfig:
        return SeaCacheConfig(
            threshold=threshold,
            residual_order=order,
            max_consecutive_cached=max_skip,
            retention_steps=first,
            cache_end_steps=last,
        )

    return shipped_arm(cfg, pipe, Knob("threshold", 1e-4, 1e3), config)
