"""What the pipelines of the matrix have beside their transformer: solvers, and stand-ins for what they ask and do not run."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict
from torch import nn

from experiments.training.video_vae import build_vae


def euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def dynamic_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def dpm() -> Any:
    return DPMSolverMultistepScheduler()


def flow_dpm() -> Any:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def ddim() -> Any:
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


def edm() -> Any:
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon")


def image_vae() -> dict[str, Any]:
    """A VAE of images in 4 channels, an eighth of their size."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, sample_size=64, scaling_factor=0.36,
        shift_factor=0.1, **blocks,
    )  # fmt: skip
    return {"vae": vae.eval()}


def video_vae() -> dict[str, Any]:
    """A VAE of videos in 16 channels."""
    return {"vae": build_vae(0).eval()}


class Part(nn.Module):
    """A part without weights, where the others are."""

    device, dtype = torch.device("cpu"), torch.float32


class Checker(Part):
    """Finds nothing wrong."""

    def check_text_safety(self, text: str) -> bool:
        return True


def checker() -> dict[str, Any]:
    return {"safety_checker": Checker()}


class Passing(Part):
    """Gives the text's embeddings to picture and sound as they are."""

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor, padding_side: str) -> tuple[torch.Tensor, ...]:
        return embeds, embeds, mask


class Latents(Part):
    """What a pipeline asks of a VAE that it does not run."""

    def __init__(self, channels: int, **about: Any) -> None:
        super().__init__()
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        self.config = FrozenDict(about)
        for name, value in about.items():
            setattr(self, name, value)


def picture_and_sound() -> dict[str, Any]:
    """The parts of LTX-2 beside its transformer."""
    sound = dict(sample_rate=16000, mel_hop_length=160, mel_bins=64, latent_channels=8)
    return {
        "connectors": Passing(),
        "vae": Latents(16, scaling_factor=1.0, spatial_compression_ratio=32, temporal_compression_ratio=8),
        "audio_vae": Latents(128, mel_compression_ratio=4, temporal_compression_ratio=4, **sound),
    }
