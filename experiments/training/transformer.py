"""The transformer of the embedded video model: rectified flow on latents of rendered scenes.

Two things make it trainable on two cores. The latents are encoded once, beforehand. And the pipeline's 512
text positions, nearly all of them equal zero pads, are replaced by the caption's own positions and *one* pad
that counts for all the others: a bias of log(number of pads) on its attention score gives exactly the same
softmax (see `PadCountAttention`), at a tenth of the cost.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from erta.signature import weights_digest
from experiments.scenes import Scene, caption, sample_scene
from experiments.training.loop import Losses, StageSettings, Trainer
from experiments.training.muon import Muon
from experiments.training.text import MAX_WORDS, TEXT_DIM, encode_words
from experiments.training.vae import as_batch

TEXT_LENGTH = 512  # what WanPipeline pads to by default
TRANSFORMER_CONFIG = dict(
    patch_size=(1, 2, 2),
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
CLIPS_AT_ONCE = 25
SAVE_EVERY_S = 60.0
CAPTION_DROPOUT = 0.1
QUERY_GAIN = 2.5
QUERY_BIAS = 1.5  # in units of the query's usual size
SIGMA_SHIFT = 4.0  # of the noise levels seen in training
OBJECT_WEIGHT = 4.0  # of cells with objects, on top of 1
OBJECTS_SEEN_BELOW = 0.85  # the noise level up to which the cells with objects can be told


class PadCountAttention(WanAttnProcessor):
    """Wan's attention where, in cross-attention, the last text position stands for many equal ones.

    softmax over n copies of a key with score s is that key once with score s + log(n).
    """

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.log_copies = math.log(copies)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            attention_mask = torch.zeros(1, 1, 1, encoder_hidden_states.shape[1])
            attention_mask[..., -1] = self.log_copies
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def encode_clips(
    vae: AutoencoderKLWan, path: Path, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Normalised latents (count, 16, 3, 8, 8) of rendered training scenes, where objects are, and the scenes.

    The second tensor (count, 1, 3, 8, 8) is true in cells that an object touches. The latents as the encoder
    gives them are kept at `path`, written every minute, so encoding can be resumed.
    """

    def draw(index: int) -> tuple[Scene, np.random.Generator]:
        rng = np.random.default_rng([seed, 7, index])
        return sample_scene(rng, "train"), rng

    scenes = [draw(index)[0] for index in range(count)]
    made_from = {"autoencoder": weights_digest(vae), "clips": _digest(as_batch(draw(i) for i in range(CLIPS_AT_ONCE)))}
    kept = load_file(path) if path.exists() and read_metadata(path) == made_from else {}
    chunks = [kept["latents"][:count]] if kept else []
    touched = [kept["objects"][:count]] if kept else []
    start = len(chunks[0]) if chunks else 0
    saved = time.monotonic()
    for first in track(range(start, count, CLIPS_AT_ONCE), description="encode clips", disable=start == count):
        tensor = as_batch(draw(i) for i in range(first, min(first + CLIPS_AT_ONCE, count)))
        with torch.no_grad():
            chunks.append(vae.encode(tensor).latent_dist.mode().half())
        touched.append(object_cells(tensor))
        if first + CLIPS_AT_ONCE >= count or time.monotonic() - saved > SAVE_EVERY_S:
            partial = path.with_suffix(".partial")
            save_file({"latents": torch.cat(chunks), "objects": torch.cat(touched)}, partial, made_from)
            os.replace(partial, path)
            saved = time.monotonic()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (torch.cat(chunks).float() - mean) / std, torch.cat(touched), scenes


def _digest(clips: torch.Tensor) -> str:
    """Of some clips and the cells that are noted as their objects': other scenes, or other cells, give another."""
    return hashlib.sha256(clips.numpy().tobytes() + object_cells(clips).numpy().tobytes()).hexdigest()


def object_cells(clips: torch.Tensor) -> torch.Tensor:
    """Cells of the latents that an object touches: clips (b, 3, 9, 64, 64) in [-1, 1] → bool (b, 1, 3, 8, 8)."""
    coloured = (clips.amax(dim=1, keepdim=True) - clips.amin(dim=1, keepdim=True) > 0.3).float()
    later = functional.max_pool3d(coloured[:, :, 1:], (4, 8, 8))  # the first frame has latents of its own
    return torch.cat([functional.max_pool3d(coloured[:, :, :1], (1, 8, 8)), later], dim=2) > 0


def hard_objects(scene: Scene) -> int:
    """How many objects of the scene are hard to draw: stars, and small squares, which come out as blobs for longest.

    Scenes are drawn more often by their number. What a caption means stays the same, only captions shift.
    """
    return sum(thing.shape == "star" or (thing.shape, thing.size) == ("square", "small") for thing in scene.objects)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def build_transformer(seed: int) -> WanTransformer3DModel:
    """A freshly initialised transformer whose output and residual branches start near zero."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
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


def flow_loss(
    transformer: nn.Module, latents: torch.Tensor, objects: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the velocity `noise - latents` at `x = (1 - sigma) latents + sigma noise`.

    Cells with objects count more, but only where the noise lets one see which cells these are: there the
    weight is known from the input, so the velocity that minimises the loss stays the conditional mean.
    """
    noise = torch.randn_like(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = transformer(hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
    error = (velocity - (noise - latents)).square()
    weight = 1 + OBJECT_WEIGHT * (objects & (level < OBJECTS_SEEN_BELOW))
    weighted = error * (weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True))
    return weighted.mean(), error.mean(dim=(1, 2, 3, 4))


def make_optimizers(transformer: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    named = list(transformer.named_parameters())
    matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
    others = [p for name, p in named if not (name.startswith("blocks.") and p.ndim == 2)]
    muon = Muon(matrices, lr=learning_rate, weight_decay=0.01)
    return [muon, torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]


def train_transformer(
    settings: StageSettings,
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    on_sample: Callable[[WanTransformer3DModel, int], None] | None = None,
    until_step: int | None = None,
    compile_step: bool = True,
) -> WanTransformer3DModel:
    """Train (or go on training) and save the averaged weights under `folder`/transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, objects, scenes = encode_clips(vae, folder / "latents.safetensors", NUM_CLIPS, settings.seed)
    transformer = build_transformer(settings.seed)
    length = MAX_WORDS + 1  # the last position is always a pad and stands for all that are not here
    words, is_word = encode_words(tokenizer, text_encoder, [caption(scene) for scene in scenes[:100]], length)
    attend_to_words(transformer, words[is_word.bool()])
    counted = PadCountAttention(TEXT_LENGTH - length + 1)
    transformer.set_attn_processor(counted)
    forward = torch.compile(transformer) if compile_step else transformer

    draws = np.repeat(np.arange(len(scenes)), [1 + hard_objects(scene) for scene in scenes])

    def loss_fn(step: int, rng: np.random.Generator) -> Losses:
        picked = draws[rng.integers(0, len(draws), size=BATCH_SIZE)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(scenes[i], rng) for i in picked]
        with torch.no_grad():
            text, _ = encode_words(tokenizer, text_encoder, captions, length)
        uniform = (torch.arange(BATCH_SIZE) + torch.rand(BATCH_SIZE)) / BATCH_SIZE  # stratified
        sigma = SIGMA_SHIFT * uniform / (1 + (SIGMA_SHIFT - 1) * uniform)
        loss, per_sample = flow_loss(forward, latents[picked], objects[picked], text, sigma)
        high = per_sample.detach()[sigma > 0.8].mean().item()
        return loss, {"loss_high_sigma": high}

    def sample(step: int) -> None:
        assert on_sample is not None
        transformer.set_attn_processor(WanAttnProcessor())
        try:
            on_sample(transformer, step)
        finally:
            transformer.set_attn_processor(counted)

    optimizers = make_optimizers(transformer, settings.learning_rate)
    Trainer(settings, transformer, loss_fn, optimizers, folder, sample if on_sample else None).run(until_step)
    transformer.set_attn_processor(WanAttnProcessor())
    transformer.save_pretrained(folder / "transformer")
    return transformer
