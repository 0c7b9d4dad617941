"""What the pipelines of the matrix have beside their transformer: solvers, and stand-ins for what they ask and do not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from experiments.models.open_sora.autoencoder import AutoencoderKLOpenSora
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training.video_vae import build_vae
from tests.pipelines import TINY_VAE, tiny_t5


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


def karras_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


def flow_map() -> Any:
    return FlowMapEulerDiscreteScheduler(shift=5.0)


def scm() -> Any:
    return SCMScheduler()


def ddim() -> Any:
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


def edm() -> Any:
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, prediction_type="epsilon")


def image_vae(channels: int = 4) -> dict[str, Any]:
    """A VAE of images in so many channels, an eighth of their size."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=channels, norm_num_groups=4, sample_size=64,
        scaling_factor=0.36,
        shift_factor=0.1, **blocks,
    )  # fmt: skip
    return {"vae": vae.eval()}


def flux2_vae() -> dict[str, Any]:
    """A VAE of images in 4 channels, half their size."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4), latent_channels=4, norm_num_groups=1, layers_per_block=1, sample_size=32, **blocks
    )
    return {"vae": vae.eval()}


def qwen_vae() -> dict[str, Any]:
    """A VAE of images in 4 channels, a quarter of their size."""
    torch.manual_seed(1)
    vae = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return {"vae": vae.eval()}


def deep_vae() -> dict[str, Any]:
    """Sana's kind of VAE, in 4 channels, half the size."""
    torch.manual_seed(1)
    kinds, sizes = ("ResBlock", "EfficientViTBlock"), (8, 8)
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=sizes, decoder_block_out_channels=sizes, encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return {"vae": vae.eval()}


def wan_vae() -> dict[str, Any]:
    """A VAE of videos in 16 channels, an eighth of their size, a quarter of their length."""
    torch.manual_seed(1)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {"vae": vae.eval()}


def seeing(parts: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """These parts, and what looks at a picture, of width 4."""

    def made() -> dict[str, Any]:
        torch.manual_seed(1)
        config = CLIPVisionConfig(
            hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=16,
            patch_size=16,
        )  # fmt: skip
        processor = CLIPImageProcessor(crop_size=32, size=32)
        return {**parts(), "image_encoder": CLIPVisionModelWithProjection(config).eval(), "image_processor": processor}

    return made


def seeing_siglip(parts: Callable[[], dict[str, Any]], width: int = 12) -> Callable[[], dict[str, Any]]:
    """These parts, and what looks at a picture by SigLIP."""

    def made() -> dict[str, Any]:
        torch.manual_seed(1)
        config = SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=16,
        )
        extractor = SiglipImageProcessor(size={"height": 32, "width": 32})
        return {**parts(), "image_encoder": SiglipVisionModel(config).eval(), "feature_extractor": extractor}

    return made


def cosmos_vae() -> dict[str, Any]:
    """Cosmos 1's VAE in 4 channels, an eighth of the size, and its checker."""
    torch.manual_seed(1)
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, attention_resolutions=(8,),
        resolution=64, num_layers=1, patch_size=4, patch_type="haar", scaling_factor=1.0, spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return {"vae": vae.eval(), **checker()}


def video_vae() -> dict[str, Any]:
    """A VAE of videos in 16 channels."""
    return {"vae": build_vae(0).eval()}


def cog_vae() -> dict[str, Any]:
    """A VAE of videos in 4 channels, an eighth of their size, a quarter of their length."""
    torch.manual_seed(1)
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, **kinds,
    )  # fmt: skip
    return {"vae": vae.eval()}


def open_sora_parts() -> dict[str, Any]:
    """Open-Sora's text encoder and VAE."""
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_t5(tokenizer),
        "vae": AutoencoderKLOpenSora(**TINY_VAE).eval(),
    }


def qwen_pooling() -> dict[str, Any]:
    """A stand-in for Qwen's VAE that makes pictures of 1024² small: it averages."""
    about = {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = Pooling(**about)
    vae.temperal_downsample = [True] * 6
    return {"vae": vae}


def hunyuan_vae() -> dict[str, Any]:
    """The same of HunyuanVideo."""
    torch.manual_seed(1)
    kinds = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        **kinds,
    )  # fmt: skip
    return {"vae": vae.eval()}


def guided_hunyuan_15() -> dict[str, Any]:
    """HunyuanVideo 1.5's VAE and guider."""
    torch.manual_seed(1)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    return {"vae": vae.eval(), "guider": ClassifierFreeGuidance(guidance_scale=4.0)}


def guiders() -> dict[str, Any]:
    return {name: ClassifierFreeGuidance(guidance_scale=4.0) for name in ("guider", "ocr_guider")}


def guided_wan() -> dict[str, Any]:
    return {**wan_vae(), "guider": ClassifierFreeGuidance(guidance_scale=4.0)}


def ltx_vae() -> dict[str, Any]:
    """A VAE of videos in 16 channels."""
    torch.manual_seed(1)
    sizes, layers, scaling = (8,) * 4, (1,) * 5, (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=sizes, decoder_block_out_channels=sizes, layers_per_block=layers,
        decoder_layers_per_block=layers, spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return {"vae": vae.eval()}


def magvit_vae() -> dict[str, Any]:
    """EasyAnimate's kind of VAE, in 4 channels."""
    torch.manual_seed(1)
    down = ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3)
    up = ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3)
    vae = AutoencoderKLMagvit(
        down_block_types=down, up_block_types=up, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    return {"vae": vae.eval()}


class Part(nn.Module):
    """A part without weights, where the others are."""

    device, dtype = torch.device("cpu"), torch.float32


class Checker(Part):
    """Finds nothing wrong."""

    def check_text_safety(self, text: str) -> bool:
        return True


def checker() -> dict[str, Any]:
    return {"safety_checker": Checker()}


def wan_vae_and_checker() -> dict[str, Any]:
    return {**wan_vae(), **checker()}


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


class Pooling(Part):
    """A stand-in for a VAE: means of 64 × 64 pixels, in four channels."""

    def __init__(self, **about: Any) -> None:
        super().__init__()
        self.config = FrozenDict(about)

    def encode(self, picture: torch.Tensor) -> AutoencoderKLOutput:
        small = nn.functional.avg_pool2d(picture[:, :, 0], 64)
        values = torch.cat([small, small.mean(1, keepdim=True)], 1)[:, :, None]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([values, values - 20], 1)))


def picture_and_sound() -> dict[str, Any]:
    """The parts of LTX-2 beside its transformer."""
    sound = dict(sample_rate=16000, mel_hop_length=160, mel_bins=64, latent_channels=8)
    return {
        "connectors": Passing(),
        "vae": Latents(16, scaling_factor=1.0, spatial_compression_ratio=32, temporal_compression_ratio=8),
        "audio_vae": Latents(128, mel_compression_ratio=4, temporal_compression_ratio=4, **sound),
    }


def picture_and_sound_vae() -> dict[str, Any]:
    """The same with a VAE that takes pictures: half their size."""
    torch.manual_seed(1)
    vae = AutoencoderKLLTX2Video(
        latent_channels=16, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return {**picture_and_sound(), "vae": vae.eval()}
