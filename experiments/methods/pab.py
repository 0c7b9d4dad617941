"""Pyramid Attention Broadcast, as diffusers ships it."""

from __future__ import annotations

from diffusers.hooks import PyramidAttentionBroadcastConfig

from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm, timesteps_between
from experiments.methods.common.knob import Knob, check_number


def arm(setup: Setup) -> Arm:
    """Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588): attention is reused, feed-forwards always run.

    Site: the outputs of attention modules. Stored: one such output a module and guidance branch. Static: inside `window`
    they are computed at every so many steps. Where we differ: it is diffusers' own, which keeps one state for all guidance
    branches, so that with separate passes the unconditional one would be given the conditional one's attention; here each
    has its own (see `CountingHook`). The window is the published one of CogVideoX in shares of the steps, not timesteps.
    """

    bounds = timesteps_between(setup)

    def config(spatial: int, cross: int | None, window: list[float]) -> PyramidAttentionBroadcastConfig:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=check_number("spatial", spatial, 1, whole=True),
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=bounds,
            cross_attention_timestep_skip_range=bounds,
            current_timestep_callback=lambda: setup.pipe.current_timestep,
        )

    return shipped_arm(setup, Knob("spatial", 1, setup.cfg.model.num_inference_steps, whole=True), config)
