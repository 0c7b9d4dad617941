"""Which prompts a run uses. Sample k of a run always has prompt k and seed `cfg.seed + k`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.scenes import Scene, caption, sample_scenes

CAPTION_SEED = 20_211


@dataclass(frozen=True)
class Prompt:
    """A prompt, its seed, and, in the scene world, the scene that it describes; `clip` is its file name, if fixed."""

    text: str
    seed: int
    scene: Scene | None = None
    clip: str | None = None


def test_prompts(cfg: DictConfig) -> list[Prompt]:
    """The held-out prompts of a run. Raises ErtaError if there are fewer than asked for."""
    count = cfg.bench.num_prompts
    if cfg.bench.prompts is not None:
        texts = _read_file(Path(cfg.bench.prompts))
    elif cfg.model.prompt_source == "scenes":
        return _scene_prompts(count, "test", cfg.seed)
    else:
        texts = _vbench_texts()[::-1]
    if len(texts) < count:
        raise ErtaError(f"{count} prompts asked for, but there are {len(texts)}: lower bench.num_prompts")
    return [Prompt(text, cfg.seed + k) for k, text in enumerate(texts[:count])]


def calibration_prompts(cfg: DictConfig) -> list[str]:
    """Prompts of another split than the tests', or of VBench's, shuffled, from the other end than theirs.

    VBench has 944 prompts: tests and calibration share some if they ask for more together.
    """
    count = cfg.calibration.num_prompts
    if cfg.model.prompt_source == "scenes":
        return [prompt.text for prompt in _scene_prompts(count, "calibration", 0)]
    return _vbench_texts()[:count]


def _scene_prompts(count: int, split: str, seed: int) -> list[Prompt]:
    rng = np.random.default_rng([CAPTION_SEED, seed])
    scenes = sample_scenes(count, split, seed)
    return [Prompt(caption(scene, rng), seed + k, scene) for k, scene in enumerate(scenes)]


def _read_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ErtaError(f"cannot read the prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ErtaError(f"{path} is not UTF-8 text (byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ErtaError(f"{path}, line {number} is empty: one prompt a line")
    if not lines:
        raise ErtaError(f"{path} holds no prompts")
    return lines


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
