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
from experiments.output.clips import keep_lossless, write_animation
from experiments.output.run_folder import append_line, read_lines
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
        if not self.keeps_all or set(wanted) <= {line["row"] for line in read_lines(folder / records.SCORES)}:
            return
        (folder / records.SCORES).unlink(missing_ok=True)
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
        for one in made:
            append_line(folder / records.SCORES, records.to_json(one))


def sample_name(cfg: DictConfig, prompt: Prompt, index: int) -> str:
    """The file of a sample: a clip as VBench wants it named, or an image."""
    return evaluation.clip_name(prompt, index) if cfg.model.num_frames else f"{index:03d}.png"


def keep_sample(
    cfg: DictConfig, folder: Path, key: str, prompt: Prompt, index: int, frames: np.ndarray, shown: int, lossless: bool
) -> None:
    """Keep a sample of a row: for a page if it is one of the first `shown`, and without loss if a benchmark reads it."""
    place = folder / SAMPLES / slug(key)
    if lossless or index < shown:
        place.mkdir(parents=True, exist_ok=True)
    if lossless:
        keep_lossless(frames, place / sample_name(cfg, prompt, index), cfg.model.fps)
    if index < shown:
        write_animation(frames, place / f"{index:03d}.webp")
