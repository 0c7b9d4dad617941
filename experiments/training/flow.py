"""Rectified flow on latents of rendered scenes: what the video and the image transformer are trained with."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from experiments.scenes import Scene, caption, render, sample_scene

ENCODED_AT_ONCE = 25
CAPTIONS_AT_ONCE = 500
CAPTIONS_PER_SCENE = 4  # wordings of every scene that training sees
FEW_CHUNKS = 20  # up to which no processes are started, and no progress is shown
SAVE_EVERY_S = 60.0
OBJECT_WEIGHT = 4.0  # of cells with objects, on top of 1
OBJECTS_SEEN_BELOW = 0.85  # the noise level up to which the cells with objects can be told
SIGMA_SHIFT = 4.0  # of the noise levels seen in training

Drawn = tuple[Scene, np.random.Generator]


def as_batch(drawn: Iterable[Drawn]) -> torch.Tensor:
    """Rendered scenes as (b, 3, frames, 64, 64) in [-1, 1]; pictures have one frame."""
    return torch.from_numpy(np.stack([render(*each) for each in drawn])).permute(0, 4, 1, 2, 3) * 2 - 1


class _Rendered(Dataset):
    """Chunks of rendered scenes; an item is the chunk that begins at that scene."""

    def __init__(self, draw: Callable[[int], Drawn], begins: range) -> None:
        self.draw, self.begins = draw, begins

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, item: int) -> torch.Tensor:
        begin = self.begins[item]
        return as_batch(self.draw(index) for index in range(begin, min(begin + self.begins.step, self.begins.stop)))


def encode_scenes(
    encode: Callable[[torch.Tensor], torch.Tensor],
    object_cells: Callable[[torch.Tensor], torch.Tensor],
    made_by: str,
    path: Path,
    count: int,
    seed: int,
    picture: bool = False,
    world: str = "plain",
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    """Latents (count, …), on `device`, of rendered training scenes as `encode` gives them, where objects are, and the scenes.

    Kept at `path` in half precision, written every minute, so encoding can be resumed. Scenes are rendered by as many
    processes as there are cores.

    Args:
        encode: scenes (b, 3, frames, 64, 64) in [-1, 1] on `device` → latents (b, …).
        object_cells: the same scenes → true in the latents' cells that an object touches.
        made_by: digest of the autoencoder; a file made by another, or of other scenes, is made anew.
    """

    def draw(index: int) -> Drawn:
        rng = np.random.default_rng([seed, 7, index])
        return sample_scene(rng, "train", picture=picture, world=world), rng

    first = as_batch(draw(index) for index in range(ENCODED_AT_ONCE))
    clips = hashlib.sha256(first.numpy().tobytes() + object_cells(first).numpy().tobytes()).hexdigest()
    made_from = {"autoencoder": made_by, "clips": clips}
    kept = load_file(path) if path.exists() and read_metadata(path) == made_from else {}
    chunks = [kept["latents"][:count]] if kept else []
    touched = [kept["objects"][:count]] if kept else []
    start = len(chunks[0]) if chunks else 0
    saved = time.monotonic()
    begins = range(start, count, ENCODED_AT_ONCE)
    workers = (os.cpu_count() or 1) if len(begins) > FEW_CHUNKS else 0
    rendered = DataLoader(_Rendered(draw, begins), batch_size=None, num_workers=workers)
    for begin, scenes in zip(begins, track(rendered, "encode scenes", len(begins), disable=not begins), strict=True):
        with torch.no_grad():
            chunks.append(encode(scenes.to(device)).half().cpu().contiguous())
        touched.append(object_cells(scenes))
        if begin + ENCODED_AT_ONCE >= count or time.monotonic() - saved > SAVE_EVERY_S:
            partial = path.with_suffix(".partial")
            save_file({"latents": torch.cat(chunks), "objects": torch.cat(touched)}, partial, made_from)
            os.replace(partial, path)
            saved = time.monotonic()
    latents, objects = torch.cat(chunks).float().to(device), torch.cat(touched).to(device)
    return latents, objects, [draw(index)[0] for index in range(count)]


def encode_captions(
    encode: Callable[[list[str]], dict[str, torch.Tensor]], scenes: list[Scene], seed: int
) -> dict[str, torch.Tensor]:
    """What `encode` gives for captions of the scenes: every tensor (b, …) as (scenes, CAPTIONS_PER_SCENE, …), half."""
    rng = np.random.default_rng([seed, 8])
    captions = [caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    chunks = []
    begins = range(0, len(captions), CAPTIONS_AT_ONCE)
    with torch.no_grad():
        for begin in track(begins, "encode captions", disable=len(begins) < FEW_CHUNKS):
            encoded = encode(captions[begin : begin + CAPTIONS_AT_ONCE])
            chunks.append({name: tensor.half() for name, tensor in encoded.items()})
    joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return {name: tensor.unflatten(0, (len(scenes), -1)) for name, tensor in joined.items()}


def pick_captions(
    encoded: dict[str, torch.Tensor],
    no_text: dict[str, torch.Tensor],
    picked: np.ndarray,
    dropout: float,
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """One caption of each picked scene, or with chance `dropout` the empty one; tensors (picked, …) in float32."""
    wording = rng.integers(0, CAPTIONS_PER_SCENE, size=len(picked))
    dropped = torch.from_numpy(rng.random(len(picked)) < dropout)
    found = {}
    for name, tensor in encoded.items():
        chosen = tensor[torch.from_numpy(picked), torch.from_numpy(wording)].float()
        where = dropped.to(chosen.device).view(-1, *[1] * (chosen.ndim - 1))
        found[name] = torch.where(where, no_text[name], chosen)
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def hard_first(scenes: list[Scene]) -> np.ndarray:
    """Indices to draw scenes from: those with objects that are hard to draw stand there several times.

    Stars, and small squares, come out as blobs for longest. What a caption means stays the same, only the mix of
    captions shifts.
    """

    def hard_objects(scene: Scene) -> int:
        return sum(o.shape == "star" or (o.shape, o.size) == ("square", "small") for o in scene.objects)

    return np.repeat(np.arange(len(scenes)), [1 + hard_objects(scene) for scene in scenes])


def noise_levels(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sigmas (count,), stratified over (0, 1) and shifted towards noise."""
    uniform = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return SIGMA_SHIFT * uniform / (1 + (SIGMA_SHIFT - 1) * uniform)


def noised(latents: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(1 - sigma) latents + sigma noise`, and the velocity `noise - latents` there; sigma (b,)."""
    noise = torch.randn_like(latents)
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise, noise - latents


def flow_loss(
    velocity: torch.Tensor, wanted: torch.Tensor, objects: torch.Tensor, sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean squared error of a velocity, and the unweighted one of every sample.

    Cells with objects count more, but only where the noise lets one see which cells these are: there the
    weight is known from the input, so the velocity that minimises the loss stays the conditional mean.
    """
    axes = tuple(range(1, wanted.ndim))
    error = (velocity - wanted).square()
    level = sigma.view(-1, *[1] * len(axes))
    weight = 1 + OBJECT_WEIGHT * (objects & (level < OBJECTS_SEEN_BELOW))
    weighted = error * (weight / weight.mean(dim=axes, keepdim=True))
    return weighted.mean(), error.mean(dim=axes)


def at_high_noise(per_sample: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean error of the samples with sigma above 0.8, where the layout is decided."""
    high = sigma > 0.8
    return (per_sample.detach() * high).sum() / high.sum().clamp(min=1)
