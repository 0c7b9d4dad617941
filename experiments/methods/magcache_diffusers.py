"""MagCache, as diffusers ships it."""

from __future__ import annotations

import numpy as np
from diffusers.hooks import MagCacheConfig

from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm
from experiments.methods.common.knob import Knob
from experiments.methods.magcache import ratios_of


def arm(setup: Setup) -> Arm:
    """MagCache (Ma et al., 2025, arXiv 2506.09045) of diffusers: one list of ratios serves all guidance branches.

    Site: the block stack's residual. Stored: one such residual in each guidance branch. Static: the ratios decide, as in
    `methods.magcache`. Where we differ: the list is the mean over branches and 5 calibration prompts.
    """
    ratios = np.mean(list(ratios_of(setup).values()), axis=0).tolist()

    def config(delta: float, max_skip: int, retention: float, constants: str) -> MagCacheConfig:
        return MagCacheConfig(
            threshold=delta,
            max_skip_steps=max_skip,
            retention_ratio=retention,
            num_inference_steps=setup.cfg.model.num_inference_steps,
            mag_ratios=ratios,
        )

    made = shipped_arm(setup, Knob("delta", 1e-6, 1e3), config)
    made.report["ratios"] = ratios
    return made
