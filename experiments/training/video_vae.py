"""The video autoencoder of the embedded model: a small AutoencoderKLWan on rendered scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.nn import functional

from experiments.scenes import sample_scene
from experiments.training.flow import as_batch
from experiments.training.loop import Losses, StageSettings, Trainer
from experiments.training.muon import muon_and_adamw

VAE_CONFIG = dict(
    base_dim=16,
    decoder_base_dim=16,
    z_dim=16,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    is_residual=True,
    attn_scales=[],
    temperal_downsample=[True, True],
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=8,
    scale_factor_temporal=4,
    latents_mean=[0.0] * 16,
    latents_std=[1.0] * 16,
)
KL_WEIGHT = 3e-5
OBJECT_WEIGHT = 4.0  # of pixels on and around objects: backgrounds cover more but matter less
BATCH_SIZE = 4
SINGLE_FRAME_SHARE = 0.20
SHORT_CLIP_SHARE = 0.53
DECODER_OBJECT_WEIGHT = 12.0  # of an object's pixels together, however small it is, against the whole clip's
DECODER_MAX_NOISE = 0.25  # on the latents, in units of their deviation


def build_vae(seed: int) -> AutoencoderKLWan:
    """A freshly initialised autoencoder: clips (b, 3, 9, 64, 64) in [-1, 1] ↔ latents (b, 16, 3, 8, 8)."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for name, module in vae.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "attentions.0.proj")):  # residual branches start at zero
                nn.init.zeros_(module.weight)
    with torch.no_grad():  # latents start almost without noise: else the decoder learns to ignore them
        vae.quant_conv.weight[VAE_CONFIG["z_dim"] :] *= 0.1
        vae.quant_conv.bias[VAE_CONFIG["z_dim"] :] = -6.0
    return vae


def clip_batch(rng: np.random.Generator, size: int, world: str = "plain") -> torch.Tensor:
    """Rendered training scenes as (size, 3, 9, 64, 64) in [-1, 1]."""
    return as_batch((sample_scene(rng, "train", world=world), rng) for _ in range(size)).contiguous()


def vae_loss(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Mean squared plus absolute error of the reconstruction, and a weak KL term that bounds the latents."""
    posterior = vae.encode(clips).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - clips
    mse = error.square().mean()
    weight = 1 + OBJECT_WEIGHT * near_objects(clips)
    kl = posterior.kl().mean()
    loss = (weight * (error.square() + 0.1 * error.abs())).mean() + KL_WEIGHT * kl
    psnr_db = -10 * torch.log10(mse.detach() / 4)
    object_mse = (error.square() * (weight > 1)).sum() / (3 * (weight > 1).sum())
    object_psnr_db = -10 * torch.log10(object_mse.detach() / 4)
    return loss, {"psnr_db": psnr_db.item(), "object_psnr_db": object_psnr_db.item(), "kl": kl.item()}


def set_latent_statistics(
    vae: AutoencoderKLWan, rng: np.random.Generator, count: int = 256, world: str = "plain"
) -> None:
    """Write the mean of the latents' channels into the config, and one deviation for all: that of the widest.

    A deviation for each channel would blow up those that the KL term has emptied (about half of them) to the
    size of the ones that hold the picture, and the transformer would spend half its capacity on them.
    """
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(clip_batch(rng, 8, world).to(vae.device)).latent_dist.mode() for _ in range(count // 8)]
        )
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=[std.max().item()] * len(std))


def decoder_loss(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Error of what the decoder makes of noisy latents; objects count alike, small or large.

    The transformer's latents are never exact. A decoder that has seen inexact ones draws the corners of a square
    and the points of a star where the first one would have drawn a blob.
    """
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
        level = DECODER_MAX_NOISE * vae.config.latents_std[0] * torch.rand(len(clips), 1, 1, 1, 1, device=clips.device)
        latents = latents + level * torch.randn_like(latents)
        near_object = near_objects(clips)
        weight = 1 + DECODER_OBJECT_WEIGHT * near_object / near_object.mean(dim=(1, 2, 3, 4), keepdim=True)
    error = vae.decode(latents).sample - clips
    loss = (weight * (error.square() + 0.1 * error.abs())).mean() / (1 + DECODER_OBJECT_WEIGHT)
    object_mse = (error.square() * near_object).sum() / (3 * near_object.sum())
    psnr_db, object_psnr_db = (-10 * torch.log10(mse.detach() / 4) for mse in (error.square().mean(), object_mse))
    return loss, {"psnr_db": psnr_db.item(), "object_psnr_db": object_psnr_db.item()}


def near_objects(clips: torch.Tensor) -> torch.Tensor:
    """1 on coloured pixels and two pixels around them, else 0: (b, 3, t, h, w) → (b, 1, t, h, w)."""
    saturation = clips.amax(dim=1, keepdim=True) - clips.amin(dim=1, keepdim=True)
    return (functional.max_pool3d(saturation, (1, 5, 5), 1, (0, 2, 2)) > 0.3).float()


def make_optimizers(vae: AutoencoderKLWan, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the kernels inside, AdamW for the ends, the latent projections and the norms."""

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        end = name.startswith(("quant", "post_quant")) or "conv_out" in name
        return parameter.ndim >= 4 and parameter[0].numel() > 1 and not end

    return muon_and_adamw(vae, is_inside, learning_rate, adamw_decay=1e-4, lr=0.7 * learning_rate, betas=(0.9, 0.99))


def train_vae(
    settings: StageSettings, folder: Path, world: str = "plain", device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """Train the autoencoder: single frames first, then clips of 5 frames, whole clips at the end."""
    vae = build_vae(settings.seed).to(device)
    single_until = int(SINGLE_FRAME_SHARE * settings.steps)
    short_until = single_until + int(SHORT_CLIP_SHARE * settings.steps)

    def draw(step: int, rng: np.random.Generator) -> torch.Tensor:
        if step < single_until:
            return clip_batch(rng, 2 * BATCH_SIZE, world)[:, :, :1]
        clips = clip_batch(rng, BATCH_SIZE, world)
        if step < short_until:
            start = int(rng.integers(0, clips.shape[2] - 4))
            clips = clips[:, :, start : start + 5]
        return clips

    def loss_fn(step: int, clips: torch.Tensor) -> Losses:
        return vae_loss(vae, clips.to(device))

    Trainer(settings, vae, loss_fn, make_optimizers(vae, settings.learning_rate), folder, draw=draw).run()
    set_latent_statistics(vae, np.random.default_rng(settings.seed), world=world)
    vae.save_pretrained(folder / "vae")
    return vae


def train_decoder(
    settings: StageSettings,
    folder: Path,
    vae: AutoencoderKLWan,
    world: str = "plain",
    device: torch.device | str = "cpu",
) -> AutoencoderKLWan:
    """Train the decoder on, alone: the latents stay what they are, so nothing trained on them changes."""
    vae.to(device)
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))

    def draw(step: int, rng: np.random.Generator) -> torch.Tensor:
        return clip_batch(rng, BATCH_SIZE, world)

    def loss_fn(step: int, clips: torch.Tensor) -> Losses:
        return decoder_loss(vae, clips.to(device))

    Trainer(settings, vae, loss_fn, make_optimizers(vae, settings.learning_rate), folder, draw=draw).run()
    vae.requires_grad_(True).save_pretrained(folder / "vae")
    return vae
