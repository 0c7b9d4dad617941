"""The transformer of the embedded video model: rectified flow on latents of rendered scenes.

Two things make it trainable on two cores. The latents are encoded once, beforehand. And the pipeline's 512
text positions, nearly all of them equal zero pads, are replaced by the caption's own positions and *one* pad
that counts for all the others: a bias of log(number of pads) on its attention score gives exactly the same
softmax (see `PadCountAttention`), at a tenth of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from erta.signature import weights_digest
from experiments.scenes import Scene, caption
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
from experiments.training.text import MAX_WORDS, TEXT_DIM, encode_words

TEXT_LENGTH = 512  # what WanPipeline pads to by default
PATCH_SIZES = {
    "plain": (1, 2, 2),
    "rich": (1, 1, 1),  # with (1, 2, 2) turned shapes came out wrong in three of four clips
}
TRANSFORMER_CONFIG = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=16,
    out_channels=16,
    text_dim=TEXT_DIM,
    freq_dim=128,
    ffn_dim=512,
    num_layers=6,
    rope_max_seq_len=64,
)
BATCH_SIZE = 64
NUM_CLIPS = 20_000
CAPTION_DROPOUT = 0.1
QUERY_GAIN = 2.5
QUERY_BIAS = 1.5  # in units of the query's usual size


class PadCountAttention(WanAttnProcessor):
    """Wan's attention where, in cross-attention, the last text position stands for many equal ones.

    softmax over n copies of a key with score s is that key once with score s + log(n).
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.log_copies = math.log(copies)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            attention_mask = encoder_hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
            attention_mask[..., -1] = self.log_copies
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def encode_clips(
    vae: AutoencoderKLWan,
    path: Path,
    count: int,
    seed: int,
    device: torch.device | str = "cpu",
    world: str = "plain",
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Normalised latents (count, 16, 3, 8, 8) of training clips, where objects are, and the scenes; see encode_scenes.

    The second tensor (count, 1, 3, 8, 8) is true in cells that an object touches.
    """

    def encode(clips: torch.Tensor) -> torch.Tensor:
        return vae.encode(clips).latent_dist.mode()

    digest = weights_digest(vae)
    vae.to(device)
    latents, objects, scenes = encode_scenes(
        encode, object_cells, digest, path, count, seed, world=world, device=device
    )
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std, objects, scenes


def object_cells(clips: torch.Tensor) -> torch.Tensor:
    """Cells of the latents that an object touches: clips (b, 3, 9, 64, 64) in [-1, 1] → bool (b, 1, 3, 8, 8)."""
    coloured = (clips.amax(dim=1, keepdim=True) - clips.amin(dim=1, keepdim=True) > 0.3).float()
    later = functional.max_pool3d(coloured[:, :, 1:], (4, 8, 8))  # the first frame has latents of its own
    return torch.cat([functional.max_pool3d(coloured[:, :, :1], (1, 8, 8)), later], dim=2) > 0


def build_transformer(seed: int, world: str = "plain") -> WanTransformer3DModel:
    """A freshly initialised transformer whose output and residual branches start near zero."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(patch_size=PATCH_SIZES[world], **TRANSFORMER_CONFIG)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("to_out.0", "ffn.net.2")):
                nn.init.normal_(module.weight, std=0.002)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


@torch.no_grad()
def attend_to_words(transformer: WanTransformer3DModel, words: torch.Tensor) -> None:
    """Start every cross-attention with nearly all its weight on words, not on the hundreds of pads around them.

    `words` (n, TEXT_DIM) are embeddings of words. Pads are zero vectors: with no biases before it their key is
    zero and scores 0, but there are so many that words get only 5 % of the weight, and less in training.
    A query bias along the words' mean key, the same for every head, lifts their score above log(pads).
    """
    embedded = transformer.condition_embedder.text_embedder(words)
    for block in transformer.blocks:
        attention = block.attn2
        mean_key = attention.norm_k(attention.to_k(embedded)).mean(0).unflatten(0, (attention.heads, -1))
        direction = nn.functional.normalize(mean_key, dim=1).flatten() / math.sqrt(attention.heads)
        attention.norm_q.weight.fill_(QUERY_GAIN)
        attention.to_q.bias.copy_(QUERY_BIAS * math.sqrt(direction.numel()) * direction)


def make_optimizers(transformer: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        return name.startswith("blocks.") and parameter.ndim == 2

    return muon_and_adamw(transformer, is_inside, learning_rate, muon_decay=0.01, betas=(0.9, 0.98))


def train_transformer(
    settings: StageSettings,
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    on_sample: Callable[[WanTransformer3DModel, int], None] | None = None,
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
    world: str = "plain",
) -> WanTransformer3DModel:
    """Train (or go on training) on `device`, and save the averaged weights under `folder`/transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, objects, scenes = encode_clips(
        vae, folder / "latents.safetensors", NUM_CLIPS, settings.seed, device, world
    )
    transformer = build_transformer(settings.seed, world)
    length = MAX_WORDS + 1  # the last position is always a pad and stands for all that are not here
    words, is_word = encode_words(tokenizer, text_encoder, [caption(scene) for scene in scenes[:100]], length)
    attend_to_words(transformer, words[is_word.bool()])
    counted = PadCountAttention(TEXT_LENGTH - length + 1)
    transformer.set_attn_processor(counted)
    forward = compiled(transformer.to(device))
    text_encoder.to(device)

    @torch.no_grad()
    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": encode_words(tokenizer, text_encoder, captions, length)[0]}

    texts, no_text, draws = encode_captions(encode, scenes, settings.seed), encode([""]), hard_first(scenes)

    def loss_fn(step: int, rng: np.random.Generator) -> Losses:
        picked = draws[rng.integers(0, len(draws), size=batch_size)]
        sigma = noise_levels(batch_size, device)
        noisy, wanted = noised(latents[picked], sigma)
        text = pick_captions(texts, no_text, picked, CAPTION_DROPOUT, rng)
        velocity = forward(hidden_states=noisy, timestep=1000 * sigma, return_dict=False, **text)[0]
        loss, per_sample = flow_loss(velocity, wanted, objects[picked], sigma)
        return loss, {"loss_high_sigma": at_high_noise(per_sample, sigma)}

    def sample(step: int) -> None:
        assert on_sample is not None
        transformer.set_attn_processor(WanAttnProcessor())
        try:
            on_sample(transformer, step)
        finally:
            transformer.set_attn_processor(counted)

    optimizers = make_optimizers(transformer, settings.learning_rate)
    Trainer(settings, transformer, loss_fn, optimizers, folder, sample if on_sample else None).run()
    transformer.set_attn_processor(WanAttnProcessor())
    transformer.save_pretrained(folder / "transformer")
    return transformer
