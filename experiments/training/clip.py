"""The embedded CLIP: a small CLIPModel trained contrastively on rendered pictures and their captions.

Its text tower is also the pooled text encoder of the embedded FLUX model, as CLIP-L's is of FLUX.1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from experiments.scenes import Scene, caption, render, sample_scene
from experiments.scenes.attributes import (
    ANY,
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    RADII_PX,
    RELATIONS,
    SHAPES,
    fit_together,
    split_of,
)
from experiments.scenes.shapes import SIZE_PX
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training.loop import Losses, StageSettings, Trainer
from experiments.training.muon import muon_and_adamw

TEXT_POSITIONS = 40  # of the text tower; checked against the longest caption by a test
EMBEDDING_DIM = 64
PAIRS = 48  # scenes a batch, each with a twin that differs in one attribute
IMAGE_MEAN, IMAGE_STD = 0.5, 0.25
CLIP_CONFIG = dict(
    projection_dim=EMBEDDING_DIM,
    text_config=dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TEXT_POSITIONS,
        projection_dim=EMBEDDING_DIM,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    ),
    vision_config=dict(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE_PX,
        patch_size=8,
        projection_dim=EMBEDDING_DIM,
    ),
)
MAX_LOGIT_SCALE = 4.6  # log 100, as in CLIP


def build_clip(vocab_size: int, seed: int) -> CLIPModel:
    """A freshly initialised model: pictures (b, 3, 64, 64) and token ids (b, 40) → embeddings (b, 64)."""
    torch.manual_seed(seed)
    config = CLIPConfig(**CLIP_CONFIG)
    config.text_config.vocab_size = vocab_size
    model = CLIPModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def build_processor(world: str = "plain") -> CLIPProcessor:
    """Pictures are taken as they are, 64x64; captions get the embedded models' word tokens."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE_PX},
        crop_size={"height": SIZE_PX, "width": SIZE_PX},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=clip_tokenizer(world))


def clip_tokenizer(world: str = "plain") -> PreTrainedTokenizerFast:
    """The word tokenizer at the text tower's length."""
    tokenizer = build_tokenizer(world)
    tokenizer.model_max_length = TEXT_POSITIONS
    return tokenizer


def twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed."""
    kinds = ["shape", "colour", "size", "background"] + (["relation"] if scene.relation else [])
    while True:
        kind = str(rng.choice(kinds))
        which = int(rng.integers(len(scene.objects)))
        thing = scene.objects[which]
        if ANY in (getattr(scene, kind, None), getattr(thing, kind, None)):
            continue  # what is left out has no other value
        if kind == "background":
            changed = replace(scene, background=str(rng.choice(BACKGROUNDS)))
        elif kind == "relation":
            changed = replace(scene, relation=OPPOSITE[scene.relation or ""])
            if rng.random() < 0.5:
                changed = replace(scene, relation=str(rng.choice(list(RELATIONS))))
        else:
            values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(RADII_PX)}[kind]
            objects = list(scene.objects)
            objects[which] = replace(thing, **{kind: str(rng.choice(values))})
            changed = replace(scene, objects=tuple(objects))
        colours = [o.colour for o in changed.objects]
        fits = fit_together([o.size for o in changed.objects])
        if changed != scene and len(set(colours)) == len(colours) and fits:
            return changed


def contrastive_loss(model: CLIPModel, pictures: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> Losses:
    """Symmetric cross-entropy over the batch (Radford et al. 2021); pictures (b, 3, 64, 64) as the processor's."""
    found = model(input_ids=tokens, attention_mask=mask, pixel_values=pictures)
    wanted = torch.arange(len(pictures), device=pictures.device)
    loss = nn.functional.cross_entropy(found.logits_per_image, wanted)
    loss = (loss + nn.functional.cross_entropy(found.logits_per_text, wanted)) / 2
    right = (found.logits_per_image.argmax(1) == wanted).float().mean().item()
    return loss, {"right_caption": right}


def train_clip(
    settings: StageSettings, folder: Path, world: str = "plain", device: torch.device | str = "cpu"
) -> CLIPModel:
    """Train, and save model and processor under `folder`/clip."""
    tokenizer = clip_tokenizer(world)
    model = build_clip(len(tokenizer), settings.seed).to(device)

    def draw(step: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = [sample_scene(rng, "train", picture=True, world=world) for _ in range(PAIRS)]
        scenes = first + [_training_twin(scene, rng) for scene in first]
        pictures = torch.from_numpy(np.concatenate([render(s, rng) for s in scenes])).permute(0, 3, 1, 2)
        text = tokenizer([caption(s, rng) for s in scenes], padding="max_length", return_tensors="pt")
        return pictures, text.input_ids, text.attention_mask

    def loss_fn(step: int, drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Losses:
        pictures, tokens, mask = (tensor.to(device) for tensor in drawn)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return contrastive_loss(model, (pictures - IMAGE_MEAN) / IMAGE_STD, tokens, mask)

    def is_inside(name: str, parameter: torch.Tensor) -> bool:
        return ".layers." in name and parameter.ndim == 2

    optimizers = muon_and_adamw(model, is_inside, settings.learning_rate, betas=(0.9, 0.98), adamw_decay=1e-4)
    Trainer(settings, model, loss_fn, optimizers, folder, draw=draw).run()
    model.save_pretrained(folder / "clip")
    build_processor(world).save_pretrained(folder / "clip")
    return model


def _training_twin(scene: Scene, rng: np.random.Generator) -> Scene:
    while True:
        other = twin(scene, rng)
        if split_of(other) == "train":
            return other
