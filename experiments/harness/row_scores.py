"""What a benchmark says of the rows of a table, beside the fidelity of each sample: VBench of clips, FID and CLIP of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from analysis import records
from analysis.figures import SAMPLES, slug
from analysis.records import RowScores
from experiments.bench import images
from experiments.bench.vbench import evaluation
from experiments.output import ranks
from experiments.output.clips import keep_lossless, write_animation
from experiments.output.files import read_lines, write_lines
from experiments.prompts.choose import Prompt, test_prompts


class RowBench:
    """The benchmark of a table: which prompts it wants, what it needs to be kept of every sample, and the scores.

    Raises ErtaError for what cannot be evaluated as asked, before anything is generated.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        if cfg.bench.image_scores:
            images.check(cfg)
        self.vbench = evaluation.prepare(cfg)

    @property
    def keeps_all(self) -> bool:
        """Whether every sample is kept, without loss."""
        return bool(self.cfg.bench.image_scores or self.vbench.dimensions)

    def prompts(self) -> list[Prompt]:
        """VBench's own in its standard suite, else the held-out ones."""
        return self.vbench.suite.prompts(self.cfg.seed) if self.vbench.suite else test_prompts(self.cfg)

    def score(self, folder: Path, rows: list[str], prompts: list[Prompt]) -> None:
        """Score the kept samples of these rows and of the uncached run; what is known already stays in `scores.jsonl`."""
        wanted = [records.UNCACHED, *rows]
        known = ranks.same(lambda: {line.get("row") for line in read_lines(folder / records.SCORES)})
        if not self.keeps_all or set(wanted) <= known:
            return
        names = [sample_name(self.cfg, prompt, index) for index, prompt in enumerate(prompts)]
        places = {key: folder / SAMPLES / slug(key) for key in wanted}
        made: list[RowScores] = []
        if self.vbench.dimensions:
            self.vbench.check()
            texts = {name: prompt.text for name, prompt in zip(names, prompts, strict=True)}
            self.vbench.score(places, texts, folder)
            made += self.vbench.rows(names)
        if self.cfg.bench.image_scores:
            made += images.score_rows(
                self.cfg, {key: [at / name for name in names] for key, at in places.items()}, prompts
            )
        if ranks.is_first():
            write_lines(folder / records.SCORES, [records.to_json(one) for one in made])


def sample_name(cfg: DictConfig, prompt: Prompt, index: int) -> str:
    """The file of a sample: a clip as VBench wants it named, or an image."""
    return evaluation.clip_name(prompt, index) if cfg.model.num_frames else f"{index:03d}.png"


def sample_files(
    cfg: DictConfig, folder: Path, key: str, prompt: Prompt, index: int, shown: int, lossless: bool
) -> list[Path]:
    """The files of a sample of a row: a preview for a page if it is one of the first `shown`, and one without loss if a
    benchmark reads it.
    """
    place = folder / SAMPLES / slug(key)
    kept = [place / sample_name(cfg, prompt, index)] if lossless else []
    return kept + ([place / f"{index:03d}.webp"] if index < shown else [])


def keep_sample(cfg: DictConfig, files: list[Path], frames: np.ndarray) -> None:
    """Write a sample into its files (see `sample_files`)."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".webp":
            write_animation(frames, path)
        else:
            keep_lossless(frames, path, cfg.model.fps)
