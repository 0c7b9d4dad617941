"""Which prompts a run uses. Sample k of a run has prompt k and seed `cfg.seed + k`, unless its file gives a seed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf

from erta.errors import ErtaError
from experiments.prompts.files import FilePrompt, read_prompt_file
from experiments.scenes import Scene, caption, sample_scenes

T = TypeVar("T")
CAPTION_SEED = 20_211


@dataclass(frozen=True)
class Prompt:
    """A prompt, its seed, its id in the records, and, in the scene world, the scene that it describes.

    `clip` is the file name of its clip, if that is fixed.
    """

    text: str
    seed: int
    scene: Scene | None = None
    clip: str | None = None
    id: str = field(kw_only=True)


def test_prompts(cfg: DictConfig, key: str = "bench.num_prompts") -> list[Prompt]:
    """The first held-out prompts, as many as `key` of the configuration says. Raises ErtaError if there are fewer."""
    count = OmegaConf.select(cfg, key)
    if cfg.bench.prompts is not None:
        chosen = _from_file(cfg.bench.prompts, count, key)
        return [Prompt(p.text, cfg.seed + k if p.seed is None else p.seed, id=p.id) for k, p in enumerate(chosen)]
    if cfg.model.prompt_source == "scenes":
        return scene_prompts(count, "test", cfg.seed, cfg.model.num_frames is None, cfg.model.world)
    texts = _enough(_vbench_texts()[::-1], count, "VBench", key)
    return [Prompt(text, cfg.seed + k, id=_place(k)) for k, text in enumerate(texts)]


def calibration_prompts(cfg: DictConfig) -> list[str]:
    """Prompts of `calibration.prompts`, else of another split than the tests', or of VBench's, shuffled, from the
    other end than theirs.

    VBench has 944 prompts: tests and calibration share some if they ask for more together. A file must not give seeds:
    calibration counts its noises by prompt.
    """
    count = cfg.calibration.num_prompts
    if cfg.calibration.prompts is not None:
        chosen = _from_file(cfg.calibration.prompts, count, "calibration.num_prompts")
        seeded = [p.id for p in chosen if p.seed is not None]
        if seeded:
            raise ErtaError(
                f"{cfg.calibration.prompts} gives a seed to {seeded[0]!r}: calibration counts its noises by prompt, "
                "leave the seeds out"
            )
        return [p.text for p in chosen]
    if cfg.model.prompt_source == "scenes":
        scenes = scene_prompts(count, "calibration", 0, cfg.model.num_frames is None, cfg.model.world)
        return [prompt.text for prompt in scenes]
    return _enough(_vbench_texts(), count, "VBench", "calibration.num_prompts")


def scene_prompts(count: int, split: str, seed: int, picture: bool = False, world: str = "plain") -> list[Prompt]:
    """Captions of `count` different scenes of a split, or of pictures; prompt k has the seed `seed + k`."""
    rng = np.random.default_rng([CAPTION_SEED, seed])
    scenes = sample_scenes(count, split, seed, picture=picture, world=world)
    return [Prompt(caption(scene, rng), seed + k, scene, id=_place(k)) for k, scene in enumerate(scenes)]


def _place(index: int) -> str:
    """The id of a prompt that has none: the name of its samples."""
    return f"{index:03d}"


def _from_file(name: str, count: int, key: str) -> list[FilePrompt]:
    return _enough(read_prompt_file(Path(name).expanduser()), count, name, key)


def _enough(prompts: list[T], count: int, source: str, key: str) -> list[T]:
    if len(prompts) < count:
        raise ErtaError(f"{key}={count}, but {source} holds only {len(prompts)}: lower {key}")
    return prompts[:count]


def _vbench_texts() -> list[str]:
    """VBench's prompts, each once, in an order that is always the same and mixes its dimensions."""
    spec = find_spec("vbench")
    if spec is None or not spec.submodule_search_locations:
        raise ErtaError(
            "VBench's prompts come with the vbench package: `make setup` installs it, or give bench.prompts=FILE"
        )
    info = Path(next(iter(spec.submodule_search_locations))) / "VBench_full_info.json"
    texts = list(dict.fromkeys(entry["prompt_en"] for entry in json.loads(info.read_text(encoding="utf-8"))))
    return [texts[k] for k in np.random.default_rng(0).permutation(len(texts))]
