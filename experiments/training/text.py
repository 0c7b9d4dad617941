"""The text side of the embedded models: a word-level tokenizer and a small encoder, UMT5 for Wan and T5 for FLUX.

The encoder is trained before the transformer, alone: from every token's output the whole scene must be
readable by linear heads, so that the transformer's cross-attention finds a bound description ("the circle is
the red one") wherever it looks. The heads are thrown away.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from experiments.scenes import Scene, caption, sample_scene
from experiments.scenes.attributes import ANY, BACKGROUNDS, COLOURS, MOTIONS, RADII_PX, RELATIONS, SHAPES
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training.loop import Losses, StageSettings, Trainer
from experiments.training.muon import muon_and_adamw

TEXT_DIM = 64
MAX_WORDS = 34  # of a caption, with the end token; checked by a test
TEXT_BATCH = 64
NONE = "none"
ENCODER_CONFIG = dict(
    d_model=TEXT_DIM,
    d_kv=16,
    d_ff=128,
    num_layers=4,
    num_heads=4,
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=64,
)


def build_text_encoder(vocab_size: int, seed: int) -> UMT5EncoderModel:
    """A freshly initialised encoder for the video model: token ids (b, n) → (b, n, TEXT_DIM)."""
    torch.manual_seed(seed)
    return UMT5EncoderModel(UMT5Config(vocab_size=vocab_size, **ENCODER_CONFIG))


def build_picture_text_encoder(vocab_size: int, seed: int) -> T5EncoderModel:
    """The same for the image model. FluxPipeline gives it no mask: pads are read like words."""
    torch.manual_seed(seed)
    return T5EncoderModel(T5Config(vocab_size=vocab_size, **ENCODER_CONFIG))


def slots(scene: Scene) -> dict[str, str]:
    """A scene as fixed slots; those of a missing second object hold `none`, those that the caption leaves out `any`."""
    first = scene.objects[0]
    second = scene.objects[1] if len(scene.objects) > 1 else None
    return {
        "first.shape": first.shape,
        "first.colour": first.colour,
        "first.size": first.size,
        "second.shape": second.shape if second else NONE,
        "second.colour": second.colour if second else NONE,
        "second.size": second.size if second else NONE,
        "background": scene.background,
        "motion": scene.motion or NONE,
        "relation": scene.relation or NONE,
    }


def as_seen(scene: Scene) -> Scene:
    """The same picture with its left or upper object first: "b right of a" as "a left of b"."""
    return scene.mirrored() if scene.relation in ("right of", "below") else scene


SLOT_VALUES = {
    "first.shape": [*SHAPES, ANY],
    "first.colour": [*COLOURS, ANY],
    "first.size": [*RADII_PX, ANY],
    "second.shape": [*SHAPES, ANY, NONE],
    "second.colour": [*COLOURS, ANY, NONE],
    "second.size": [*RADII_PX, ANY, NONE],
    "background": [*BACKGROUNDS, ANY],
    "motion": [*MOTIONS, ANY, NONE],
    "relation": [*RELATIONS, NONE],
}


class _SlotReader(nn.Module):
    """The encoder with linear heads on every token: the scene as worded, one layer before the end; as seen, there.

    Without the first, the encoder is slow to find out that "right of" swaps the objects.
    """

    def __init__(self, encoder: PreTrainedModel, masked: bool) -> None:
        super().__init__()
        self.encoder, self.masked = encoder, masked
        self.norm = nn.RMSNorm(TEXT_DIM)
        self.heads = nn.ModuleDict(
            {
                f"{view}_{name}".replace(".", "_"): nn.Linear(TEXT_DIM, len(values))
                for view in ("worded", "seen")
                for name, values in SLOT_VALUES.items()
            }
        )

    def forward(self, tokens, mask, scenes: list[Scene]) -> tuple[torch.Tensor, float]:
        """Mean cross-entropy over both views' slots, and the accuracy of the worst slot as seen."""
        states = self.encoder(tokens, mask if self.masked else None, output_hidden_states=True).hidden_states
        keep = mask.bool()
        views = {
            "worded": (self.norm(states[-2][keep]), [slots(s) for s in scenes]),
            "seen": (states[-1][keep], [slots(as_seen(s)) for s in scenes]),
        }
        loss, right = torch.zeros((), device=tokens.device), []
        for view, (embeddings, filled) in views.items():
            for name, values in SLOT_VALUES.items():
                wanted = torch.tensor([values.index(f[name]) for f in filled], device=mask.device)[:, None].expand_as(
                    mask
                )[keep]
                scores = self.heads[f"{view}_{name}".replace(".", "_")](embeddings)
                loss = loss + nn.functional.cross_entropy(scores, wanted) / (2 * len(SLOT_VALUES))
                if view == "seen":
                    right.append((scores.argmax(-1) == wanted).float().mean().item())
        return loss, min(right)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> BatchEncoding:
    """Token ids and mask (b, length)."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def encode_words(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (b, length, TEXT_DIM), zero after each caption's end as WanPipeline pads them, and the mask."""
    tokens = tokenize(tokenizer, captions, length).to(encoder.device)
    mask = tokens.attention_mask
    return encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None], mask


def train_text_encoder(
    settings: StageSettings,
    folder: Path,
    length: int = MAX_WORDS,
    picture: bool = False,
    world: str = "plain",
    device: torch.device | str = "cpu",
) -> None:
    """Train on captions of clips, or of pictures, and save tokenizer and encoder under `folder`."""
    tokenizer = build_tokenizer(world)
    build = build_picture_text_encoder if picture else build_text_encoder
    model = _SlotReader(build(len(tokenizer), settings.seed), masked=not picture).to(device)

    def draw(step: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
        scenes = [sample_scene(rng, "train", picture=picture, world=world) for _ in range(TEXT_BATCH)]
        tokens = tokenize(tokenizer, [caption(s, rng) for s in scenes], length)
        return tokens.input_ids, tokens.attention_mask, scenes

    def loss_fn(step: int, drawn: tuple[torch.Tensor, torch.Tensor, list[Scene]]) -> Losses:
        ids, mask, scenes = drawn
        loss, accuracy = model(ids.to(device), mask.to(device), scenes)
        return loss, {"worst_slot_accuracy": accuracy}

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        return ".layer." in name and parameter.ndim == 2 and "bias" not in name

    optimizers = muon_and_adamw(model, is_inside, settings.learning_rate, adamw_decay=1e-4)
    Trainer(settings, model, loss_fn, optimizers, folder, draw=draw).run()
    tokenizer.save_pretrained(folder / "tokenizer")
    model.encoder.save_pretrained(folder / "text_encoder")
