"""The transformer of the embedded image model: rectified flow on latents of pictures, then guidance distillation.

FLUX.1-dev makes one forward a step because guidance was distilled into it: it is told the scale. So is ours. It is
first trained without guidance (told 1.0), then, as its own pupil, to answer in one forward what the first one
answers in two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from erta.signature import weights_digest
from experiments.scenes import Scene
from experiments.training.clip import EMBEDDING_DIM
from experiments.training.flow import (
    at_high_noise,
    encode_captions,
    encode_scenes,
    flow_loss,
    hard_first,
    noise_levels,
    noised,
    pick_captions,
)
from experiments.training.loop import Losses, StageSettings, Trainer, compiled
from experiments.training.muon import muon_and_adamw
from experiments.training.text import TEXT_DIM, tokenize

TEXT_LENGTH = 32  # of the T5 captions; checked against the longest caption by a test
LATENT_SIDE = 16
PATCH = 2  # FLUX packs 2x2 latents into a token
TRANSFORMER_CONFIG = dict(
    patch_size=1,
    in_channels=16,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=TEXT_DIM,
    pooled_projection_dim=EMBEDDING_DIM,
    guidance_embeds=True,
    axes_dims_rope=[4, 14, 14],
)
BATCH_SIZE = 48
NUM_PICTURES = 20_000
CAPTION_DROPOUT = 0.1
MAX_GUIDANCE = 10.0  # of the shipped weights: 5


@dataclass(frozen=True)
class Texts:
    """The two text encoders of FluxPipeline, called as it calls them."""

    clip_tokenizer: PreTrainedTokenizerFast
    clip: CLIPTextModel
    tokenizer: PreTrainedTokenizerFast
    encoder: T5EncoderModel

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Transformer arguments: words (b, TEXT_LENGTH, TEXT_DIM) and pooled (b, EMBEDDING_DIM)."""
        tokens = self.clip_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pooled = self.clip(tokens.to(self.clip.device)).pooler_output
        tokens = tokenize(self.tokenizer, captions, TEXT_LENGTH).input_ids
        words = self.encoder(tokens.to(self.encoder.device)).last_hidden_state
        return {"encoder_hidden_states": words, "pooled_projections": pooled}


def build_image_transformer(seed: int) -> FluxTransformer2DModel:
    """A freshly initialised transformer whose blocks and output start at zero (adaLN-Zero)."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear")):
                nn.init.zeros_(module.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def pack(grid: torch.Tensor) -> torch.Tensor:
    """Latents (b, c, 16, 16) as FLUX's tokens (b, 64, 4 c)."""
    return FluxPipeline._pack_latents(grid, len(grid), grid.shape[1], *grid.shape[2:])


def picture_cells(pictures: torch.Tensor) -> torch.Tensor:
    """Latents that an object touches: pictures (b, 3, 1, 64, 64) in [-1, 1] → bool (b, 1, 16, 16)."""
    coloured = (pictures.amax(dim=1) - pictures.amin(dim=1) > 0.3).float()
    return functional.max_pool2d(coloured, pictures.shape[-1] // LATENT_SIDE) > 0


def encode_pictures(
    vae: AutoencoderKL,
    path: Path,
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
    world: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Normalised latents as tokens (count, 64, 16), where objects are (count, 64, 16), and the scenes."""

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode(pictures.squeeze(2)).latent_dist.mode()

    digest = weights_digest(vae)
    vae.to(device)
    raw, objects, scenes = encode_scenes(
        encode, picture_cells, digest, path, count, seed, picture=True, world=world, device=device
    )
    latents = (raw - vae.config.shift_factor) * vae.config.scaling_factor
    return pack(latents), pack(objects.expand_as(latents)), scenes


class Velocity:
    """The transformer with everything that does not change from call to call."""

    def __init__(self, transformer: Callable[..., tuple[torch.Tensor]], device: torch.device | str = "cpu") -> None:
        self.transformer = transformer
        side = LATENT_SIDE // PATCH
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, torch.device(device), torch.float32)
        self.text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)

    def __call__(
        self, noisy: torch.Tensor, sigma: torch.Tensor, guidance: torch.Tensor, text: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Tokens (b, 64, 16) at noise levels (b,), told guidance scales (b,) → velocity (b, 64, 16)."""
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
            **text,
        )[0]


def guided(teacher: Velocity, noisy, sigma, guidance, text, no_text) -> torch.Tensor:
    """Classifier-free guidance of a model that is told 1: `without + scale (with - without)`."""
    plain = torch.ones_like(sigma)
    with_text = teacher(noisy, sigma, plain, text)
    without = teacher(noisy, sigma, plain, {key: value.expand_as(text[key]) for key, value in no_text.items()})
    return without + guidance.view(-1, 1, 1) * (with_text - without)


def train_image_transformer(
    first: StageSettings,
    distillation: StageSettings,
    folder: Path,
    vae: AutoencoderKL,
    texts: Texts,
    on_sample: Callable[[FluxTransformer2DModel, int], None] | None = None,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    world: str = "plain",
) -> FluxTransformer2DModel:
    """Train without guidance under `folder`/first, distil under `folder`/distilled, and save the averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, objects, scenes = encode_pictures(
        vae, folder / "latents.safetensors", NUM_PICTURES, first.seed, device, world
    )
    transformer = build_image_transformer(first.seed)
    velocity = Velocity(compiled(transformer.to(device)), device)
    texts.clip.to(device)
    texts.encoder.to(device)
    words, no_text, draws = encode_captions(texts, scenes, first.seed), texts([""]), hard_first(scenes)

    def batch(rng: np.random.Generator):
        picked = draws[rng.integers(0, len(draws), size=batch_size)]
        sigma = noise_levels(batch_size, device)
        text = pick_captions(words, no_text, picked, CAPTION_DROPOUT, rng)
        return (*noised(latents[picked], sigma), sigma, objects[picked], text)

    def first_loss(step: int, rng: np.random.Generator) -> Losses:
        noisy, wanted, sigma, where, text = batch(rng)
        loss, per_sample = flow_loss(velocity(noisy, sigma, torch.ones_like(sigma), text), wanted, where, sigma)
        return loss, {"loss_high_sigma": at_high_noise(per_sample, sigma)}

    def sample(step: int) -> None:
        assert on_sample is not None
        on_sample(transformer, step)

    def train(stage: StageSettings, loss_fn: Callable[[int, np.random.Generator], Losses], where: str) -> None:
        optimizers = make_optimizers(transformer, stage.learning_rate)
        Trainer(stage, transformer, loss_fn, optimizers, folder / where, sample if on_sample else None).run()

    train(first, first_loss, "first")
    teacher = Velocity(copy.deepcopy(transformer).requires_grad_(False), device)

    def distillation_loss(step: int, rng: np.random.Generator) -> Losses:
        """Error relative to the scale: else the highest scales, whose velocities are largest, would be all that counts.

        A dropped caption stays what it is at any scale, so that the pupil can be guided itself (`true_cfg_scale`).
        """
        noisy, _, sigma, where, text = batch(rng)
        guidance = torch.from_numpy(rng.uniform(1, MAX_GUIDANCE, batch_size)).float().to(device)
        with torch.no_grad():
            wanted = guided(teacher, noisy, sigma, guidance, text, no_text)
        scale, answer = guidance.view(-1, 1, 1), velocity(noisy, sigma, guidance, text)
        loss, per_sample = flow_loss(answer / scale, wanted / scale, where, sigma)
        return loss, {"loss_high_sigma": at_high_noise(per_sample, sigma)}

    train(distillation, distillation_loss, "distilled")
    transformer.save_pretrained(folder / "transformer")
    return transformer


def make_optimizers(transformer: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        return "transformer_blocks." in name and parameter.ndim == 2 and "norm" not in name

    return muon_and_adamw(transformer, is_inside, learning_rate, muon_decay=0.01, betas=(0.9, 0.98))
