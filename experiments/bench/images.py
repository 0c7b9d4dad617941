"""FID and CLIP score of images, by torchmetrics: the same code for the large networks and the embedded ones.

Large: Inception (torch-fidelity's weights) and a CLIP of OpenAI's. Embedded: `clip_tiny` gives features and score on
the scene world, under names of their own, since its numbers compare with nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from analysis.intervals import paired_interval
from analysis.records import RowScores
from erta.errors import ErtaError
from experiments.models.load import ASSETS, world_of
from experiments.output import console, ranks
from experiments.output.clips import to_uint8
from experiments.prompts.choose import Prompt
from experiments.scenes import render

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
SCORES = ("fid_inception", "fid_tinyclip", "clip_score_vit", "clip_score_tinyclip")
CLIP_TINY = ASSETS / "clip_tiny"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RELIABLE_FROM = 2048  # images: below, FID is far above its value for many, and compares only at equal counts
BATCH = 32
REFERENCE_SEED = 20_508  # of the rendered reference pictures


class ClipFeatures(nn.Module):
    """A CLIPModel's unit image embeddings as features for FID: uint8 (b, 3, h, w) → (b, d)."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model.eval(), processor
        self.num_features = int(model.config.projection_dim)  # type: ignore[union-attr,arg-type]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        return nn.functional.normalize(_pooled(self.model.get_image_features(pixel_values=pixels)), dim=-1)


class _ForTorchmetrics(nn.Module):
    """A CLIPModel whose features are tensors, as torchmetrics' CLIPScore expects; transformers 5 returns outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return _pooled(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def _pooled(features: Any) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def load_clip(source: str | Path) -> tuple[nn.Module, Any]:
    """CLIPModel and processor from a local folder or the hub's cache. Raises ErtaError with what was looked for."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(source, local_files_only=Path(source).is_dir()).eval()
        return model, CLIPProcessor.from_pretrained(source, local_files_only=Path(source).is_dir())
    except (OSError, ValueError) as error:
        raise ErtaError(
            f"no CLIP at {source}, neither as a folder, nor in the hub's cache, nor on the hub. Get it with "
            f"`hf download {source} --local-dir clip` and add bench.clip=clip"
        ) from error


def clip_scores(images: Iterable[torch.Tensor], prompts: list[str], model: nn.Module, processor: Any) -> np.ndarray:
    """CLIP score of every image with its prompt, 100 max(cosine, 0) (Hessel et al. 2021); images uint8 (3, h, w).

    A caption that is longer than the text encoder's context is cut as its tokenizer cuts it, with the end token kept, which is
    where CLIP reads the text off (see `captions_cut`).
    """
    context = context_of(model)

    def cutting(text: list[str] | None = None, **options: Any) -> Any:
        cut = {} if text is None else {"text": text, "truncation": True, "max_length": context}
        return processor(**cut, **options)

    metric = CLIPScore(model_name_or_path=lambda: (_ForTorchmetrics(model), cutting))
    scores = []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            scores.append(float(metric(image[None], [prompt])))
    return np.array(scores)


def context_of(model: nn.Module) -> int:
    """Tokens that a CLIPModel's text encoder reads, begin and end among them: 77 of OpenAI's."""
    return int(model.config.text_config.max_position_embeddings)  # type: ignore[union-attr,arg-type]


def captions_cut(prompts: list[str], model: nn.Module, processor: Any) -> int:
    """How many captions are longer than the text encoder's context; says so on the console if any are."""
    context, tokenizer = context_of(model), processor.tokenizer
    long = sum(len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"]) > context for prompt in prompts)
    if long:
        console.note(
            f"{long} of {len(prompts)} captions are longer than the {context} tokens that this CLIP reads: their scores are of "
            "what was left when they were cut"
        )
    return long


def fid(features: int | nn.Module, reference: Iterable[torch.Tensor], images: Iterable[torch.Tensor]) -> float:
    """Fréchet distance (Heusel et al. 2017) between two sets of uint8 images (3, h, w), at least 2 each.

    Args:
        features: 2048 for Inception, or a module uint8 (b, 3, h, w) → (b, d).
    """
    return fid_to(features, reference)(images)


def fid_to(features: int | nn.Module, reference: Iterable[torch.Tensor]) -> Callable[[Iterable[torch.Tensor]], float]:
    """What gives `fid` of sets of images to one reference, which is looked at once.

    Ranks share the images of each set: every rank is given all of them, looks at its own, and the sums over features, which are
    all that FID knows of a set, are added.
    """
    metric = FrechetInceptionDistance(feature=features, reset_real_features=False, sync_on_compute=False)
    metric.orig_dtype = torch.float32  # where a rank is given no image
    _look_at(metric, reference, "real")

    def distance(images: Iterable[torch.Tensor]) -> float:
        metric.reset()  # of the other side alone
        _look_at(metric, images, "fake")
        return float(metric.compute())

    return distance


def _look_at(metric: FrechetInceptionDistance, images: Iterable[torch.Tensor], side: str) -> None:
    """Add this rank's share of the images to the sums of one side, then all ranks' sums."""
    for batch in _batches(ranks.share_of_each(images)):
        metric.update(batch, real=side == "real")
    for state in ("features_sum", "features_cov_sum", "features_num_samples"):
        name = f"{side}_{state}"
        setattr(metric, name, ranks.added(getattr(metric, name)))


def _batches(images: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    batch: list[torch.Tensor] = []
    for image in images:
        if batch and (len(batch) == BATCH or batch[0].shape != image.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


def read_image(path: Path) -> torch.Tensor:
    """An image file as uint8 (3, h, w). Raises ErtaError that names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ErtaError(f"{path} is not a readable image: {error}") from error


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, sorted. Raises ErtaError if there are fewer than two."""
    if not folder.is_dir():
        raise ErtaError(f"bench.reference={folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise ErtaError(f"{folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}); FID needs at least 2")
    return files


def check(cfg: DictConfig) -> None:
    """Raise ErtaError before anything is generated, if this benchmark cannot be run as asked."""
    if cfg.model.num_frames is not None:
        raise ErtaError(
            f"bench={cfg.bench.name} scores images, and model={cfg.model.name} makes videos: take bench=vbench, or a "
            "model of images such as model=flux_tiny"
        )
    if cfg.bench.num_prompts < 2:
        raise ErtaError(f"FID needs at least 2 images: bench.num_prompts={cfg.bench.num_prompts} is too few")
    if cfg.bench.num_reference < 2:
        raise ErtaError(f"FID needs at least 2 reference images, not bench.num_reference={cfg.bench.num_reference}")
    if cfg.bench.reference is not None:
        for path in track(image_files(Path(cfg.bench.reference)), description="check reference images", transient=True):
            read_image(path)


def scores_of(cfg: DictConfig, folder: Path, prompts: list[Prompt]) -> tuple[dict[str, Any], dict[str, str]]:
    """FID and CLIP score of both arms, or why not (see `score`)."""
    if cfg.bench.image_scores:
        return score(cfg, folder, prompts)
    return {}, dict.fromkeys(SCORES, f"bench={cfg.bench.name} does not ask for it: bench=fid_clip, on images, does")


@dataclass
class Networks:
    """The networks that score: features for FID by name, the CLIP of the score with its name, and what is not there."""

    features: dict[str, int | nn.Module]
    clip: tuple[nn.Module, Any] | None
    clip_name: str
    missing: dict[str, str]


def load_networks(cfg: DictConfig, prompts: list[Prompt]) -> Networks:
    """Inception and a CLIP, which is `clip_tiny` on scenes unless `bench.clip` names another."""
    missing: dict[str, str] = {}
    on_scenes = all(prompt.scene is not None for prompt in prompts)
    features: dict[str, int | nn.Module] = {}
    inception = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if inception.is_file():
        features["inception"] = 2048
    else:
        missing["fid_inception"] = f"Inception weights not found: {inception}"
    chosen, name = cfg.bench.clip, "tinyclip" if on_scenes and cfg.bench.clip is None else "vit"
    other = "vit" if name == "tinyclip" else "tinyclip"
    missing[f"clip_score_{other}"] = (
        "pictures of the scene world are scored by clip_tiny; bench.clip=FOLDER takes another"
        if name == "tinyclip"
        else "clip_tiny knows the scene world alone"
    )
    clip = None
    try:
        clip = load_clip(CLIP_TINY if name == "tinyclip" else chosen or "openai/clip-vit-base-patch16")
        if name == "tinyclip":
            known = world_of(clip[1].tokenizer)
            if {known} != {prompt.scene.world for prompt in prompts if prompt.scene is not None}:
                raise ErtaError(f"clip_tiny knows the {known} world alone")
    except ErtaError as error:
        clip, missing[f"clip_score_{name}"] = None, str(error)
    if clip is not None and name == "tinyclip":
        features["tinyclip"] = ClipFeatures(*clip)
    else:
        missing["fid_tinyclip"] = missing["clip_score_tinyclip"]
    return Networks(features, clip, name, missing)


def score(cfg: DictConfig, folder: Path, prompts: list[Prompt]) -> tuple[dict[str, Any], dict[str, str]]:
    """FID and CLIP score of `folder`/samples, both arms: metrics as in the record, and what is missing, with why."""
    metrics: dict[str, Any] = {}
    arms = {
        arm: [folder / "samples" / arm / f"{k:03d}.png" for k in range(len(prompts))] for arm in ("uncached", "cached")
    }
    networks = load_networks(cfg, prompts)
    name, missing, texts = networks.clip_name, networks.missing, [prompt.text for prompt in prompts]
    if networks.clip is not None:
        per_arm = {arm: clip_scores(map(read_image, files), texts, *networks.clip) for arm, files in arms.items()}
        metrics[f"clip_score_{name}"] = float(per_arm["cached"].mean())
        metrics[f"clip_score_{name}_uncached"] = float(per_arm["uncached"].mean())
        metrics[f"clip_captions_cut_{name}"] = captions_cut(texts, *networks.clip)
        difference = paired_interval(per_arm["cached"] - per_arm["uncached"])
        metrics[f"clip_score_{name}_difference"] = [difference.mean, difference.low, difference.high]
    reference = reference_images(cfg, prompts)
    with console.progress_bar() as bar:
        task = bar.add_task("FID", total=3 * len(networks.features), visible=bool(networks.features))
        for network, features in networks.features.items():
            bar.update(task, description=f"FID: {network}")
            to_uncached = fid_to(features, map(read_image, arms["uncached"]))
            metrics[f"fid_{network}_to_uncached"] = to_uncached(map(read_image, arms["cached"]))
            bar.advance(task)
            if not reference:
                missing[f"fid_{network}"] = "no reference images: bench.reference=FOLDER"
                bar.advance(task, 2)
                continue
            to_reference = fid_to(features, _opened(reference))
            for arm, ending in (("cached", ""), ("uncached", "_uncached")):
                metrics[f"fid_{network}{ending}"] = to_reference(map(read_image, arms[arm]))
                bar.advance(task)
    if networks.features:
        metrics["fid_counts"] = {"generated": len(prompts), "reference": len(reference)}
        _warn_of_few(len(prompts), len(reference))
    return metrics, missing


def score_rows(cfg: DictConfig, samples: dict[str, list[Path]], prompts: list[Prompt]) -> list[RowScores]:
    """`fid` and `clip_score` of the images of every row of a table; Inception's FID where it is there, else `clip_tiny`'s."""
    networks, reference = load_networks(cfg, prompts), reference_images(cfg, prompts)
    features, texts = next(iter(networks.features.items()), None), [prompt.text for prompt in prompts]
    missing = {} if networks.clip is not None else {"clip_score": networks.missing[f"clip_score_{networks.clip_name}"]}
    if features is None or not reference:
        missing["fid"] = (
            networks.missing["fid_inception"] if reference else "no reference images: bench.reference=FOLDER"
        )
    distance = None if features is None or not reference else fid_to(features[1], _opened(reference))
    if networks.clip is not None:
        captions_cut(texts, *networks.clip)
    made = []
    with console.progress_bar() as bar:
        for key, files in bar.track(samples.items(), description="FID and CLIP score", total=len(samples)):
            scores = RowScores(row=key, missing=missing)
            if networks.clip is not None:
                found = clip_scores(map(read_image, files), texts, *networks.clip)
                scores.by_sample["clip_score"] = [float(value) for value in found]
                scores.networks["clip_score"] = networks.clip_name
            if features is not None and distance is not None:
                scores.whole["fid"] = distance(map(read_image, files))
                scores.networks["fid"] = features[0]
            made.append(scores)
    if features is not None:
        _warn_of_few(len(prompts), len(reference))
    return made


def _warn_of_few(generated: int, reference: int) -> None:
    smallest = min(count for count in (generated, reference) if count)
    if smallest < RELIABLE_FROM:
        console.note(
            f"FID of {generated} images against {reference or 'no'} references: below {RELIABLE_FROM} it is far above its "
            "value for many, so compare it at equal counts only"
        )


def reference_images(cfg: DictConfig, prompts: list[Prompt]) -> list[Path | torch.Tensor]:
    """Files of `bench.reference`; without it, the prompts' own scenes, rendered in turn; without scenes, none."""
    if cfg.bench.reference is not None:
        return list(image_files(Path(cfg.bench.reference)))
    scenes = [prompt.scene for prompt in prompts if prompt.scene is not None]
    if len(scenes) < len(prompts):
        return []
    rng = np.random.default_rng(REFERENCE_SEED)
    pictures = np.concatenate([render(scenes[k % len(scenes)], rng) for k in range(cfg.bench.num_reference)])
    return list(torch.from_numpy(to_uint8(pictures)).permute(0, 3, 1, 2))


def _opened(images: list[Path | torch.Tensor]) -> Iterator[torch.Tensor]:
    return (read_image(image) if isinstance(image, Path) else image for image in images)
