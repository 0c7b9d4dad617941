"""Uncached and cached samples of the same prompts and noise, measured in turns, and what they sum up to."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.records import MainRecord, Memory, Steps, Timing
from experiments.bench import fidelity
from experiments.bench.fidelity import Lpips
from experiments.bench.scene import scene_agreement
from experiments.bench.vbench import evaluation
from experiments.harness.arm import Arm
from experiments.harness.generate import Sample, needed_s
from experiments.harness.setup import Setup
from experiments.output import clips, console, ranks, report, tracking
from experiments.output.console import progress_bar
from experiments.output.files import append_line, read_own_lines
from experiments.output.provenance import describe_run
from experiments.prompts.choose import Prompt
from experiments.scenes import CHANCE_LEVEL

ARMS = ("uncached", "cached")
PER_PROMPT = "per_prompt.jsonl"


def sample_all(
    setup: Setup, arm: Arm, prompts: list[Prompt], folder: Path, tracker: tracking.Tracker
) -> list[dict[str, Any]]:
    """Both arms on every prompt, in turns; a line a prompt, kept in `folder`, where a second call goes on.

    A line is known by its index, prompt and seed. Of several ranks (see `ranks`) each makes its share of what is missing.
    """
    pipe, places = setup.pipe, Places(setup, folder)
    path = folder / PER_PROMPT

    def index_of(row: dict[str, Any]) -> int | None:
        index = row.get("index")
        if not isinstance(index, int) or not 0 <= index < len(prompts):
            return None
        asked = prompts[index]
        return (
            index if [row.get(key) for key in ("id", "prompt", "seed")] == [asked.id, asked.text, asked.seed] else None
        )

    ranks.merge_lines(path)
    rows = {row["index"]: row for row in ranks.same(lambda: read_own_lines(path, index_of))}
    if rows:
        console.note(f"going on in {folder}: {len(rows)} of {len(prompts)} prompts are done")
    for index in sorted(rows):
        tracker.log(rows[index])
    lost = ranks.same(lambda: [index for index in sorted(rows) if not places.are_whole(prompts[index], index)])
    todo = [index for index in range(len(prompts)) if index in lost or index not in rows]
    lpips, sides = Lpips(), {"uncached": Arm(None, setup.kwargs), "cached": arm}
    if len(rows) < len(prompts):  # warm-up, not measured
        Arm(None, {**setup.kwargs, "num_inference_steps": 2}).sample(pipe, prompts[0])
    with progress_bar() as bar:
        mine = ranks.share(todo)
        task = bar.add_task("uncached and cached samples", total=len(mine) + len(rows), completed=len(rows))
        for index in mine:
            prompt = prompts[index]
            order = ARMS if index % 2 == 0 else ARMS[::-1]  # alternating, so that drift hits both
            samples = {name: sides[name].sample(pipe, prompt) for name in order}
            compared = {name: places.keep(name, prompt, index, sample.frames) for name, sample in samples.items()}
            if index in rows:  # a lost sample is made anew; its row stays
                continue
            row = _measure(index, prompt, samples, fidelity.compare(compared["cached"], compared["uncached"], lpips))
            append_line(ranks.own_file(path), row)
            tracker.log(row)
            bar.advance(task)
    ranks.merge_lines(path)
    made = ranks.same(lambda: read_own_lines(path, index_of))
    for row in made:
        if row["index"] not in rows and row["index"] not in mine:  # another rank's
            tracker.log(row)
    return sorted(made, key=lambda row: row["index"])


@dataclass(frozen=True)
class Places:
    """Where the samples of a run are kept: without loss, as previews, and as mp4 where fidelity is measured on that."""

    setup: Setup
    folder: Path

    def __post_init__(self) -> None:
        for name in ARMS:
            (self.folder / "samples" / name).mkdir(parents=True, exist_ok=True)

    def of(self, name: str, prompt: Prompt, index: int) -> list[Path]:
        """The sample of one arm, and its preview if it has one."""
        place = self.folder / "samples" / name
        is_clip = self.setup.cfg.model.num_frames is not None
        kept = place / (evaluation.clip_name(prompt, index) if is_clip else f"{index:03d}.png")
        return [kept, place / f"{index:03d}.webp"] if index < report.MAX_CLIPS else [kept]

    def are_whole(self, prompt: Prompt, index: int) -> bool:
        """Whether all files of both arms are there and can be read."""
        return all(clips.is_whole(path) for name in ARMS for path in self.of(name, prompt, index))

    def keep(self, name: str, prompt: Prompt, index: int, frames: np.ndarray) -> np.ndarray:
        """Write one sample; its frames as fidelity compares them."""
        cfg = self.setup.cfg
        compared = clips.frames_of(
            cfg.bench.frames_from, frames, self.folder / "samples" / "mp4" / name / f"{index:03d}.mp4"
        )
        kept, *preview = self.of(name, prompt, index)
        clips.keep_lossless(frames, kept, cfg.model.fps)
        for path in preview:
            clips.write_animation(frames, path)
        return compared


def _measure(index: int, prompt: Prompt, samples: dict[str, Sample], scores: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "id": prompt.id, "prompt": prompt.text, "seed": prompt.seed, **scores}
    for name, sample in samples.items():
        row[name] = {
            "denoise_s": sample.denoise_s,
            "pipeline_s": sample.pipeline_s,
            "forward_s": sample.forward_s,
            "forwards": sample.forwards,
            "overhead_s": sample.overhead_s,
            "overhead_calls": sample.overhead_calls,
            "cache_bytes": sample.cache_bytes,
            "cache_dtype": sample.cache_dtype,
            "without_reuse": sample.mask is not None and sample.forwards > samples["uncached"].forwards - 1e-3,
            "mask": sample.mask and [int(computed) for computed in sample.mask],
            "scene": scene_agreement(prompt, sample.frames),
        }
    return row


def summarise(
    setup: Setup,
    arm: Arm,
    prompts: list[Prompt],
    rows: list[dict[str, Any]],
    scores: list[tuple[dict[str, Any], dict[str, str]]],
) -> MainRecord:
    """The record of all samples. `scores` are metrics of benchmarks, each with what is missing and why."""
    cfg, clock = setup.cfg, Clock(setup, arm, rows)
    metrics, missing = fidelity.summarise(rows)
    metrics["frames_from"] = cfg.bench.frames_from
    metrics |= clock.speedups()
    if rows[0]["cached"]["scene"] is not None:
        metrics["scene_accuracy"] = _scene_accuracy(rows, "cached")
        metrics["scene_accuracy_uncached"] = _scene_accuracy(rows, "uncached")
        metrics["scene_chance_level"] = CHANCE_LEVEL
    else:
        missing["scene_accuracy"] = "the prompts are not of the scene world"
    if rows[0]["cached"]["mask"] is not None and not clock.overhead_s:
        missing["hook_overhead"] = "another library's hooks: their own time is not told apart from the model's"
    for found, absent in scores:
        metrics |= found
        missing |= absent
    mask = rows[0]["cached"]["mask"] or [1] * arm.num_steps
    return MainRecord(
        **describe_run(cfg, prompts),
        steps=Steps(
            total=len(mask),
            computed=arm.num_computed if arm.attach is None else whole(clock.forwards / clock.branches),
            mask=mask,
            uncached=cfg.model.num_inference_steps,
            without_reuse=sum(row["cached"]["without_reuse"] for row in rows),
        ),
        sigmas=[float(s) for s in arm.sigmas(setup)],
        timing=clock.timing(),
        memory=Memory(
            cache_bytes=max(row["cached"]["cache_bytes"] for row in rows),
            cache_dtype=rows[0]["cached"]["cache_dtype"],
            peak_bytes=_peak_bytes(),
        ),
        metrics=metrics,
        missing=missing,
        plan_report=arm.about,
    )


@dataclass(frozen=True)
class Clock:
    """What pairs of samples took: medians over the pairs, in seconds."""

    setup: Setup
    arm: Arm
    rows: list[dict[str, Any]]

    def median(self, side: str, key: str) -> float:
        return float(np.median([row[side][key] for row in self.rows]))

    @property
    def steps(self) -> int:
        """Of the uncached side."""
        return self.setup.cfg.model.num_inference_steps

    @property
    def branches(self) -> float:
        """Guidance branches: forwards of an uncached step."""
        return self.rows[0]["uncached"]["forwards"] / self.steps

    @property
    def forwards(self) -> float:
        """Of a cached sample, mean over prompts."""
        return float(np.mean([row["cached"]["forwards"] for row in self.rows]))

    @property
    def overhead_s(self) -> float:
        """Of the hook at one forward; 0 where another library's hooks do not tell."""
        calls = sum(row["cached"]["overhead_calls"] for row in self.rows)
        return sum(row["cached"]["overhead_s"] for row in self.rows) / calls if calls else 0.0

    @property
    def forward_s(self) -> float:
        """Of one forward of the uncached side."""
        return self.median("uncached", "forward_s") / self.steps / self.branches

    @property
    def solver_s(self) -> float:
        """What a step of the uncached side takes beside its forwards."""
        rest = [row["uncached"]["denoise_s"] - row["uncached"]["forward_s"] for row in self.rows]
        return max(float(np.median(rest)) / self.steps, 0.0)

    def speedups(self) -> dict[str, float]:
        """Measured; possible; and `speedup_realised`, how much of the possible one was reached.

        Possible is the uncached denoising over what the cached side needed of its own: its own forwards, and the solver's
        steps, which are no slower than the uncached side's. Both were measured in this run, pair by pair, so what was measured
        cannot be more: the rest of the cached side is the hook, and steps that are slower than uncached ones.
        """
        uncached_s, cached_s = self.median("uncached", "denoise_s"), self.median("cached", "denoise_s")
        needed_s = float(np.median([self._needed_s(row["cached"]) for row in self.rows]))
        found = {
            "speedup_denoise": uncached_s / cached_s,
            "speedup_pipeline": self.median("uncached", "pipeline_s") / self.median("cached", "pipeline_s"),
            "speedup_possible": uncached_s / needed_s,
        }
        if self.overhead_s:
            found["speedup_realised"] = needed_s / cached_s
        return found

    def _needed_s(self, cached: dict[str, Any]) -> float:
        solver_s = self.arm.num_steps * self.solver_s
        return needed_s(cached["denoise_s"], cached["forward_s"], cached["overhead_s"], solver_s)

    def timing(self) -> Timing:
        """For the record."""
        return Timing(
            denoise_s=self.median("cached", "denoise_s"),
            denoise_uncached_s=self.median("uncached", "denoise_s"),
            pipeline_s=self.median("cached", "pipeline_s"),
            pipeline_uncached_s=self.median("uncached", "pipeline_s"),
            forward_s=self.forward_s,
            solver_step_s=self.solver_s,
            calibration_s=self.arm.calibration_s,
            hook_overhead_per_step_s=self.overhead_s * self.branches,
            hook_overhead_of_forward=self.overhead_s / self.forward_s,
            forwards=whole(self.forwards),
            forwards_uncached=self.rows[0]["uncached"]["forwards"],
            repeats=len(self.rows),
        )


def whole(value: float) -> int | float:
    """A count, which is a fraction where a cache leaves parts of a forward out."""
    return int(value) if value == int(value) else value


def _scene_accuracy(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Share of clips that are right, by attribute, for all attributes together, and those by number of objects."""
    scenes = [row[name]["scene"] for row in rows]
    keys = [key for key in (*CHANCE_LEVEL, "all") if any(key in scene for scene in scenes)]
    rates = {key: float(np.mean([scene[key] for scene in scenes if key in scene])) for key in keys}
    for label, two in (("all, one object", False), ("all, two objects", True)):
        group = [scene["all"] for scene in scenes if ("relation" in scene) == two]
        if group:
            rates[label] = float(np.mean(group))
    return rates


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
