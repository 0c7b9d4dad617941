"""VBench's standard suite: its prompts, the file names it looks for, and whether all of them are there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.bench.vbench.dimensions import requested
from experiments.prompts.choose import Prompt

MAX_NAME_BYTES = 255  # of a file, on the file systems of Linux and macOS


@dataclass(frozen=True)
class Suite:
    """The part of the suite that a run needs.

    Attributes:
        entries: of VBench_full_info.json, as they stand there (946; two texts stand there twice).
        texts: the prompts to generate, each once.
        is_whole: every prompt of the requested dimensions is among them.
    """

    entries: list[dict[str, Any]]
    texts: list[str]
    is_whole: bool
    videos_per_prompt: int

    def prompts(self, seed: int) -> list[Prompt]:
        """Every video of the suite: first one of each prompt, then a second of each, and so on."""
        pairs = [(text, index) for index in range(self.videos_per_prompt) for text in self.texts]
        return [
            Prompt(text, video_seed(seed, text, index), clip=video_name(text, index), id=f"{text}-{index}")
            for text, index in pairs
        ]

    def manifest(self, dimension: str) -> list[dict[str, Any]]:
        """The entries of one dimension, each with the names of its videos under `videos`."""
        chosen = set(self.texts)
        return [
            {**entry, "videos": [video_name(entry["prompt_en"], index) for index in range(self.videos_per_prompt)]}
            for entry in self.entries
            if dimension in entry["dimension"] and entry["prompt_en"] in chosen
        ]


def load_suite(cfg: DictConfig, info: Path) -> Suite:
    """The suite of a run; `bench.num_prompts` takes the first so many prompts of each dimension.

    Args:
        info: VBench_full_info.json of the package.
    """
    entries = json.loads(info.read_text(encoding="utf-8"))
    limit, chosen, needed = cfg.bench.num_prompts, set(), set()
    for dimension in requested(cfg.bench.dimensions):
        texts = [entry["prompt_en"] for entry in entries if dimension in entry["dimension"]]
        needed |= set(texts)
        chosen |= set(texts[:limit])
    ordered = [text for text in dict.fromkeys(entry["prompt_en"] for entry in entries) if text in chosen]
    return Suite(entries, ordered, chosen == needed, cfg.bench.videos_per_prompt)


def video_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4`, which is what VBench looks for.

    A prompt that no file can be named after (too long, or with a slash) keeps its beginning, and a digest of the
    whole follows an underscore: human_action reads the label of a clip from its name up to there.
    """
    ending = f"-{index}.mp4"
    if "/" not in prompt and len((prompt + ending).encode()) <= MAX_NAME_BYTES:
        return prompt + ending
    ending = f"_{hashlib.sha256(prompt.encode()).hexdigest()[:12]}{ending}"
    kept = prompt.replace("/", " ").encode()[: MAX_NAME_BYTES - len(ending)]
    return kept.decode(errors="ignore") + ending


def video_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of one video, the same whichever other prompts and dimensions a run has."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{index}\n{prompt}".encode()).digest()[:4], "big")


def check_complete(folders: list[Path], names: list[str]) -> None:
    """Raise ErtaError if a video is missing or empty. VBench would score what is left, with a warning."""
    present = {folder: {path.name for path in folder.glob("*.mp4") if path.stat().st_size > 0} for folder in folders}
    absent = [folder / name for folder in folders for name in names if name not in present[folder]]
    if absent:
        first = ", ".join(repr(str(path)) for path in absent[:3])
        raise ErtaError(
            f"{len(absent)} of {len(folders) * len(names)} videos are missing, the first of them {first}.\n"
            "The same command makes them and goes on."
        )
