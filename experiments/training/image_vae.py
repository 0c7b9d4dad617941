"""The image autoencoder of the embedded FLUX model: a small AutoencoderKL on rendered pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from experiments.scenes import sample_scene
from experiments.training.flow import as_batch
from experiments.training.loop import Losses, StageSettings, Trainer
from experiments.training.muon import muon_and_adamw
from experiments.training.video_vae import near_objects

VAE_CONFIG = dict(
    block_out_channels=[16, 32, 64],
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=64,
    force_upcast=False,
    scaling_factor=1.0,
    shift_factor=0.0,
)
KL_WEIGHT = 3e-5
OBJECT_WEIGHT = 4.0  # of pixels on and around objects
MAX_NOISE = 0.2  # on the latents, in units of their deviation: the transformer's are never exact
BATCH_SIZE = 16


def build_image_vae(seed: int) -> AutoencoderKL:
    """A freshly initialised autoencoder: pictures (b, 3, 64, 64) in [-1, 1] ↔ latents (b, 4, 16, 16)."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):  # residual branches start at zero
                nn.init.zeros_(module.weight)
    with torch.no_grad():  # latents start almost without noise: else the decoder learns to ignore them
        channels = VAE_CONFIG["latent_channels"]
        vae.encoder.conv_out.weight[channels:] *= 0.1
        vae.encoder.conv_out.bias[channels:] = -6.0
    return vae


def picture_batch(rng: np.random.Generator, size: int, world: str = "plain") -> torch.Tensor:
    """Rendered training pictures as (size, 3, 64, 64) in [-1, 1]."""
    return (
        as_batch((sample_scene(rng, "train", picture=True, world=world), rng) for _ in range(size))
        .squeeze(2)
        .contiguous()
    )


def image_vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> Losses:
    """Squared plus absolute error of what is decoded from noisy latents, and a weak KL term that bounds them."""
    posterior = vae.encode(pictures).latent_dist
    latents = posterior.sample()
    level = MAX_NOISE * latents.detach().std() * torch.rand(len(latents), 1, 1, 1, device=latents.device)
    error = vae.decode(latents + level * torch.randn_like(latents)).sample - pictures
    near_object = near_objects(pictures.unsqueeze(2)).squeeze(2)
    weight = 1 + OBJECT_WEIGHT * near_object
    kl = posterior.kl().mean()
    loss = (weight * (error.square() + 0.1 * error.abs())).mean() + KL_WEIGHT * kl
    object_mse = (error.square() * near_object).sum() / (3 * near_object.sum())
    psnr_db, object_psnr_db = (-10 * torch.log10(mse.detach() / 4) for mse in (error.square().mean(), object_mse))
    return loss, {"psnr_db": psnr_db.item(), "object_psnr_db": object_psnr_db.item(), "kl": kl.item()}


def make_optimizers(vae: AutoencoderKL, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the kernels inside, AdamW for the ends and the norms."""
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim == 4 and not name.startswith(ends)

    return muon_and_adamw(vae, is_inside, learning_rate, adamw_decay=1e-4, lr=0.7 * learning_rate, betas=(0.9, 0.99))


def train_image_vae(
    settings: StageSettings, folder: Path, world: str = "plain", device: torch.device | str = "cpu"
) -> AutoencoderKL:
    """Train, write the latents' mean and deviation into the config, and save under `folder`/vae."""
    vae = build_image_vae(settings.seed).to(device)

    def draw(step: int, rng: np.random.Generator) -> torch.Tensor:
        return picture_batch(rng, BATCH_SIZE, world)

    def loss_fn(step: int, pictures: torch.Tensor) -> Losses:
        return image_vae_loss(vae, pictures.to(device))

    Trainer(settings, vae, loss_fn, make_optimizers(vae, settings.learning_rate), folder, draw=draw).run()
    rng = np.random.default_rng(settings.seed)
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(picture_batch(rng, 16, world).to(device)).latent_dist.mode() for _ in range(16)]
        )
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae")
    return vae
