"""SeaCache, as diffusers ships it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from erta.architectures import architecture_of, latent_of
from erta.errors import ErtaError
from erta.pipeline import find_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm
from experiments.methods.common.knob import Knob


def clips(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The latents of a forward as SeaCache wants them: (channels, frames, height, width) each."""
    return list(latent_of(args, kwargs).unbind(0))


def arm(setup: Setup) -> Arm:
    """SeaCache (2026, arXiv 2602.18993): TeaCache's rule on spectrally filtered latents, without a polynomial.

    Site: the block stack's residual. Stored: that residual, the one before for its extrapolation, and the last filtered
    signal, in each guidance branch. Decided online. Where we differ: it is diffusers' own, with no limit on runs of reused
    steps (its default: 2), so that every budget can be reached. Raises ErtaError for other models than Wan
    text-to-video and Open-Sora: the hook asks the pipeline for sigma and step, which the others do not give it, and then
    computes everything; and for a diffusers without it.
    """
    try:
        from diffusers.hooks import SeaCacheConfig  # not in the oldest diffusers that the rest runs with
    except ImportError as error:
        raise ErtaError(
            "cache=seacache needs diffusers' SeaCache: pip install 'diffusers>=0.42.1' (make setup does)"
        ) from error

    transformer = find_denoiser(setup.pipe)
    if not architecture_of(transformer).is_told_the_step:
        raise ErtaError(
            "cache=seacache runs on Wan text-to-video and Open-Sora only: diffusers' SeaCache would compute everything"
        )

    shown = None if isinstance(transformer, WanTransformer3DModel) else clips  # diffusers knows Wan's itself

    def config(threshold: float, order: int, max_skip: int, first: int, last: int) -> SeaCacheConfig:
        return SeaCacheConfig(
            threshold=threshold,
            residual_order=order,
            max_consecutive_cached=max_skip,
            retention_steps=first,
            cache_end_steps=last,
            raw_vision_callback=shown,
        )

    return shipped_arm(setup, Knob("threshold", 1e-4, 1e3), config)
