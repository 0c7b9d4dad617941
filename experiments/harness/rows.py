"""Rows of a table on the same prompts and noise: sampled once, resumable, compared in pairs.

A row is a list of command-line overrides, so each one can be run alone by `python run.py` with them. Every row
is compared with the same uncached clips, paired by prompt and seed; forwards are counted, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from analysis.intervals import Interval, mean_psnr, paired_interval
from erta.calibration import Calibration
from erta.errors import ErtaError
from experiments.bench.fidelity import psnr_db, ssim
from experiments.bench.scene import scene_agreement
from experiments.harness import config
from experiments.harness.arm import Arm, make_arm
from experiments.harness.calibrations import get_calibration
from experiments.harness.generate import generate
from experiments.models.call import call_kwargs
from experiments.models.load import load_pipeline
from experiments.output import console
from experiments.output.clips import frames_of
from experiments.output.console import progress_bar
from experiments.output.run_folder import append_line, check_inputs, describe_inputs, read_lines
from experiments.prompts.choose import Prompt, test_prompts

NO_CORRECTOR = "cache.corrector_at_reused=false"


UNCACHED = "uncached"  # folder


SEED_STRIDE = 100_000  # between the noises of one prompt


COLUMNS = (
    "row",
    "forwards",
    "PSNR dB, ± std",
    "against {reference} (95 %)",
    "SSIM",
    "scene, all",
    "against uncached (95 %)",
    "last sigma step",
)


@dataclass(frozen=True)
class Row:
    """A label and what is typed after `python run.py` for it. `computed` is the number of computed steps.

    Rows are compared with the reference row of their own group: same `computed`, same `site` if that is named.
    """

    label: str
    overrides: tuple[str, ...]
    computed: int | None = None
    site: str | None = None

    @property
    def group(self) -> str:
        where = ", ".join(str(part) for part in (self.site, self.computed) if part is not None)
        return f" ({where})" if where else ""

    @property
    def key(self) -> str:
        return self.label + self.group


@dataclass(frozen=True)
class Results:
    """All samples of a table: per row a list over seeds and prompts in the order of `prompts`."""

    prompts: list[Prompt]
    seeds: int
    rows: dict[str, list[dict[str, Any]]]
    groups: dict[str, str]  # row key → what follows the label in the keys of its group
    uncached_scene: list[dict[str, bool] | None]

    def values(self, key: str, metric: str) -> np.ndarray:
        """A metric of a row by prompt, mean over seeds; NaN where clips are identical to the uncached ones."""
        values = [np.nan if row[metric] is None else row[metric] for row in self.rows[key]]
        return np.array(values, float).reshape(self.seeds, -1).mean(0)

    def psnr_gain(self, key: str, reference: str) -> Interval | None:
        """Paired gain in decibels over another row, 95 % over prompts; None where a clip is identical."""
        differences = self.values(key, "psnr_db") - self.values(reference, "psnr_db")
        return None if np.isnan(differences).any() else paired_interval(differences)


class RowArms:
    """Makes the arms of rows on one pipeline; a site's calibration is found, or made, once."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.calibrations = pipe, dict[str, Calibration]()

    def calibration(self, cfg: DictConfig) -> Calibration:
        """That of the configuration's site."""
        if cfg.cache.site not in self.calibrations:
            self.calibrations[cfg.cache.site] = get_calibration(cfg, self.pipe)
        return self.calibrations[cfg.cache.site]

    def build(self, row: Row) -> Arm:
        """What the row's overrides put on the pipeline."""
        cfg = compose_row(row)
        return make_arm(cfg, self.pipe, lambda: self.calibration(cfg))


def sample_rows(cfg: DictConfig, folder: Path, rows: list[Row], seeds: int = 1) -> Results:
    """Sample every row on every prompt and seed. What `rows.jsonl` in `folder` already holds is not made again."""
    check_what_rows_share(cfg)
    once, pipe = test_prompts(cfg), load_pipeline(cfg)
    if not hasattr(pipe.scheduler, "disable_corrector"):
        rows = [row for row in rows if NO_CORRECTOR not in row.overrides]
        console.note(f"{type(pipe.scheduler).__name__} has no corrector: rows with the corrector off are left out")
    prompts = [replace(p, seed=p.seed + SEED_STRIDE * s) for s in range(seeds) for p in once]
    arms = RowArms(pipe)
    check_inputs(folder, describe_inputs(pipe, prompts, arms.calibration(cfg)))
    path = folder / "rows.jsonl"
    done = {(row["row"], row["index"]): row for row in read_lines(path)}
    references = uncached_clips(pipe, cfg, prompts, folder)
    compared = comparer(cfg)
    with progress_bar() as bar:
        task = bar.add_task("rows", total=len(rows) * len(prompts), completed=len(done))
        for row in rows:
            missing = [k for k in range(len(prompts)) if (row.key, k) not in done]
            if not missing:
                continue
            bar.update(task, description=row.key)
            arm = arms.build(row)
            grid = arm.sigmas(pipe)
            for index in missing:
                sample = generate(pipe, prompts[index].text, prompts[index].seed, arm.kwargs, arm.put_on)
                pair = compared(sample.frames, references[index])
                done[row.key, index] = {
                    "row": row.key,
                    "index": index,
                    "forwards": sample.forwards,
                    "denoise_s": sample.denoise_s,
                    "psnr_db": psnr_db(*pair),
                    "ssim": ssim(*pair),
                    "scene": scene_agreement(prompts[index], sample.frames),
                    "last_step": float(grid[-2]),
                }
                append_line(path, done[row.key, index])
                bar.advance(task)
    return Results(
        prompts=prompts,
        seeds=seeds,
        rows={row.key: [done[row.key, k] for k in range(len(prompts))] for row in rows},
        groups={row.key: row.group for row in rows},
        uncached_scene=[scene_agreement(p, frames) for p, frames in zip(prompts, references, strict=True)],
    )


def comparer(cfg: DictConfig) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    """What gives the frames of a clip and of its reference as `bench.frames_from` wants them compared."""

    def compared(clip: np.ndarray, reference: np.ndarray) -> list[np.ndarray]:
        with TemporaryDirectory() as folder:
            return [frames_of(cfg.bench.frames_from, each, Path(folder, "compared.mp4")) for each in (clip, reference)]

    return compared if cfg.bench.frames_from != "decoded" else lambda clip, reference: [clip, reference]


def check_what_rows_share(cfg: DictConfig) -> None:
    """Raise ErtaError for settings that every row of a table sets for itself, and say what holds for all of them."""
    typed = [item for item in HydraConfig.get().overrides.task if item.startswith(("cache=", "cache."))]
    if typed:
        raise ErtaError(f"{', '.join(typed)}: the rows of this table decide about the cache; leave it out")
    if cfg.calibration.path is not None:
        raise ErtaError("calibration.path: a table may need several calibrations; they are found, or made and kept")
    if cfg.bench.frames_from != "decoded":
        console.note(f"PSNR and SSIM compare frames read from {cfg.bench.frames_from} files, in all rows")


def compose_row(row: Row) -> DictConfig:
    """The configuration of this run with a row's overrides."""
    typed = HydraConfig.get().overrides.task
    budget = [] if row.computed is None else [f"cache.steps={row.computed}"]
    cfg = compose("config", overrides=[*typed, *row.overrides, *budget])
    config.validate(cfg)
    return cfg


def tabulate(results: Results, reference: str) -> list[list[str]]:
    """Table rows in the order of `COLUMNS`. `reference` is the label that rows of equal budget are compared with."""
    table = []
    known = [scene["all"] for scene in results.uncached_scene if scene]
    if known:
        table.append(["uncached", "", "", "", "", f"{np.mean(known):.1%}", "", ""])
    for key, samples in results.rows.items():
        values = [row["psnr_db"] for row in samples]
        mean, gain = mean_psnr(values), ""
        against = reference + results.groups[key]
        if against in results.rows and key != against:
            gain = interval_text(results.psnr_gain(key, against), "+.2f")
        scenes = [row["scene"]["all"] for row in samples if row["scene"]]
        change = ""
        if scenes and len(known) == len(scenes):
            by_prompt = (np.array(scenes, float) - np.array(known, float)).reshape(results.seeds, -1).mean(0)
            change = interval_text(paired_interval(by_prompt), "+.1%")
        table.append(
            [
                key,
                "/".join(f"{count:g}" for count in sorted({round(row["forwards"], 1) for row in samples})),
                "identical" if mean is None else f"{mean:.2f} ± {np.std([v for v in values if v is not None]):.2f}",
                gain,
                f"{np.mean([row['ssim'] for row in samples]):.4f}",
                f"{np.mean(scenes):.1%}" if scenes else "",
                change,
                f"{samples[0]['last_step']:.3f}",
            ]
        )
    return table


def columns(reference: str) -> list[str]:
    """Headings of `tabulate`."""
    return [name.format(reference=reference) for name in COLUMNS]


def interval_text(interval: Interval | None, form: str) -> str:
    """An interval as `mean [low, high]`; nothing if there is none."""
    return "" if interval is None else f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def uncached_path(folder: Path, index: int) -> Path:
    """Where the uncached clip of the k-th prompt is kept."""
    return folder / UNCACHED / f"{index:03d}.npy"


def uncached_clips(pipe: Any, cfg: DictConfig, prompts: list[Prompt], folder: Path) -> list[np.ndarray]:
    """Uncached clips, kept beside the rows so that a continued run compares with the same ones."""
    paths = [uncached_path(folder, index) for index in range(len(prompts))]
    (folder / UNCACHED).mkdir(exist_ok=True)
    missing = [(path, prompt) for path, prompt in zip(paths, prompts, strict=True) if not path.is_file()]
    if missing:
        with progress_bar() as bar:
            for path, prompt in bar.track(missing, description="uncached clips"):
                partial = path.with_suffix(".partial.npy")
                np.save(partial, generate(pipe, prompt.text, prompt.seed, call_kwargs(cfg)).frames)
                partial.replace(path)
    return [np.load(path, mmap_mode="c") for path in paths]
