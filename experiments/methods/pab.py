"""Pyramid Attention Broadcast, as diffusers ships it."""

from __future__ import annotations

from diffusers.hooks import PyramidAttentionBroadcastConfig

from erta.architectures import Architecture, architecture_of
from erta.errors import ErtaError
from erta.pipeline import find_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm, timesteps_between
from experiments.methods.common.knob import Knob, check_number


def arm(setup: Setup) -> Arm:
    """Pyramid Attention Broadcast (Zhao et al., 2024, arXiv 2408.12588): attention is reused, feed-forwards always run.

    Site: the outputs of attention modules. Stored: one such output a module and guidance branch. Static: inside `window`
    they are computed at every so many steps: spatial (or all) self-attention, that over time, and cross-attention, each at
    its own. Where we differ: it is diffusers' own, which keeps one state for all guidance branches, so that with separate
    passes the unconditional one would be given the conditional one's attention; here each has its own (see
    `CountingHook`). The window is the published one of CogVideoX in shares of the steps, not timesteps. Open-Sora's published
    reuse of some feed-forwards is left out, which diffusers' has not.

    Raises ErtaError for a `temporal` on a model without attention over time alone.
    """
    known, bounds = architecture_of(find_denoiser(setup.pipe)), timesteps_between(setup)
    places = places_of(known)
    if setup.options["temporal"] is not None and "temporal" not in known.components:
        raise ErtaError(f"cache.options.temporal: {known.name} has no attention over time alone: leave it at null")

    def config(
        spatial: int, temporal: int | None, cross: int | None, window: list[float]
    ) -> PyramidAttentionBroadcastConfig:
        spatial = check_number("spatial", spatial, 1, whole=True)
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial,
            temporal_attention_block_skip_range=spatial
            if temporal is None
            else check_number("temporal", temporal, 1, whole=True),
            cross_attention_block_skip_range=cross,
            spatial_attention_timestep_skip_range=bounds,
            temporal_attention_timestep_skip_range=bounds,
            cross_attention_timestep_skip_range=bounds,
            current_timestep_callback=lambda: setup.pipe.current_timestep,
            **places,
        )

    return shipped_arm(setup, Knob("spatial", 1, setup.cfg.model.num_inference_steps, whole=True), config)


def places_of(known: Architecture) -> dict[str, tuple[str, ...]]:
    """diffusers' patterns of each kind of attention, where a model has one over time alone; else diffusers' own do."""
    if "temporal" not in known.components:
        return {}
    kinds = {"spatial": "attention", "temporal": "temporal", "cross": "cross"}
    return {f"{place}_attention_block_identifiers": (f"^{known.components[kind]}$",) for place, kind in kinds.items()}
