"""FasterCache's attention half, as diffusers ships it."""

from __future__ import annotations

from diffusers.hooks import FasterCacheConfig

from erta.architectures import architecture_of, knowing
from erta.errors import ErtaError
from erta.pipeline import find_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm, timesteps_between
from experiments.methods.common.knob import Knob, check_number


def arm(setup: Setup) -> Arm:
    """FasterCache (Lv et al., 2024, arXiv 2410.19355), its attention half: self-attention follows its last two outputs.

    Site: the outputs of self-attention modules. Stored: the last two a module and guidance branch. Static: inside `window`
    they are computed at every so many steps. Where we differ: it is diffusers' own; the other half, which foretells the
    unconditional branch by frequencies, wants both branches in one batch. Wan's pipeline runs them one after the other and
    FLUX has none, so there it is left out, as diffusers does for distilled models, and so it is on Open-Sora, which would have
    it; each branch keeps its own outputs here.
    The window is CogVideoX's in shares of the steps. Raises ErtaError for other transformers.
    """
    known, bounds = architecture_of(find_denoiser(setup.pipe)), timesteps_between(setup)
    if known.self_attention is None:
        raise ErtaError(
            f"cache={setup.cfg.cache.name} does not know the self-attention of {known.name} (it knows that of "
            f"{knowing('self_attention')})"
        )

    def config(spatial: int, window: list[float], weight: float) -> FasterCacheConfig:
        check_number("weight", weight, 0)
        return FasterCacheConfig(
            spatial_attention_block_skip_range=check_number("spatial", spatial, 1, whole=True),
            spatial_attention_timestep_skip_range=bounds,
            spatial_attention_block_identifiers=(known.self_attention,),
            temporal_attention_block_identifiers=(),
            attention_weight_callback=lambda module: weight,
            current_timestep_callback=lambda: setup.pipe.current_timestep,
            is_guidance_distilled=True,
        )

    return shipped_arm(setup, Knob("spatial", 1, setup.cfg.model.num_inference_steps, whole=True), config)
