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
from experiments.bench import fidelity, images
from experiments.bench.fidelity import Lpips
from experiments.bench.scene import scene_agreement
from experiments.bench.vbench import evaluation
from experiments.harness.arm import Arm
from experiments.harness.generate import Sample, possible_speedup
from experiments.harness.setup import Setup
from experiments.output import clips, console, report, tracking
from experiments.output.console import progress_bar
from experiments.output.run_folder import append_line, describe_run, read_lines
from experiments.prompts.choose import Prompt
from experiments.scenes import CHANCE_LEVEL

ARMS = ("uncached", "cached")
PER_PROMPT = "per_prompt.jsonl"


def sample_all(
    setup: Setup, arm: Arm, prompts: list[Prompt], folder: Path, tracker: tracking.Tracker
) -> list[dict[str, Any]]:
    """Both arms on every prompt, in turns; a line a prompt, kept in `folder`, where a second call goes on."""
    cfg, pipe = setup.cfg, setup.pipe
    for name in ARMS:
        (folder / "samples" / name).mkdir(parents=True, exist_ok=True)
    rows = read_lines(folder / PER_PROMPT)
    if rows:
        console.note(f"going on in {folder}: {len(rows)} of {len(prompts)} prompts are done")
    for row in rows:
        tracker.log(row)
    lpips, sides = Lpips(), {"uncached": Arm(None, setup.kwargs), "cached": arm}
    if len(rows) < len(prompts):  # warm-up, not measured
        Arm(None, {**setup.kwargs, "num_inference_steps": 2}).sample(pipe, prompts[0])
    with progress_bar() as bar:
        task = bar.add_task("uncached and cached samples", total=len(prompts), completed=len(rows))
        for index, prompt in enumerate(prompts):
            kept = evaluation.clip_name(prompt, index) if cfg.model.num_frames else f"{index:03d}.png"
            is_measured = index < len(rows)
            if is_measured and all((folder / "samples" / name / kept).is_file() for name in ARMS):
                continue
            order = ARMS if index % 2 == 0 else ARMS[::-1]  # alternating, so that drift hits both
            samples = {name: sides[name].sample(pipe, prompt) for name in order}
            compared: dict[str, np.ndarray] = {}
            for name, sample in samples.items():
                mp4 = folder / "samples" / "mp4" / name / f"{index:03d}.mp4"
                compared[name] = clips.frames_of(cfg.bench.frames_from, sample.frames, mp4)
                clips.keep_lossless(sample.frames, folder / "samples" / name / kept, cfg.model.fps)
                if index < report.MAX_CLIPS:
                    clips.write_animation(sample.frames, folder / "samples" / name / f"{index:03d}.webp")
            if is_measured:  # a lost sample is made anew; its row stays
                continue
            row = _measure(index, prompt, samples, fidelity.compare(compared["cached"], compared["uncached"], lpips))
            append_line(folder / PER_PROMPT, row)
            rows.append(row)
            tracker.log(row)
            bar.advance(task)
    return rows


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
    vbench: evaluation.Evaluation,
    folder: Path,
) -> MainRecord:
    """The record of all samples, image and VBench scores among its metrics."""
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
    for found, absent in (vbench.summarise(), images.scores_of(cfg, folder, prompts)):
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
        """Measured; possible with as many forwards; and `speedup_realised`, how much of the possible one was reached.

        The last is what the cached side's own forwards and the solver's steps take, over its whole denoising, median over
        samples: the rest is the hook, and steps that are slower than uncached ones. Forwards of two runs differ by several
        percent from one minute to the next, so a share in which uncached forwards stand for cached ones lies above 1 as
        often as not; this one cannot.
        """
        found = {
            "speedup_denoise": self.median("uncached", "denoise_s") / self.median("cached", "denoise_s"),
            "speedup_pipeline": self.median("uncached", "pipeline_s") / self.median("cached", "pipeline_s"),
            "speedup_possible": possible_speedup(
                self.steps,
                self.forwards / self.branches,
                self.forward_s * self.branches,
                self.solver_s,
                self.arm.num_steps,
            ),
        }
        if self.overhead_s:
            found["speedup_realised"] = float(np.median([self._realised(row["cached"]) for row in self.rows]))
        return found

    def _realised(self, cached: dict[str, Any]) -> float:
        own_s = cached["denoise_s"] - cached["forward_s"] - cached["overhead_s"]
        return (cached["forward_s"] + min(self.arm.num_steps * self.solver_s, own_s)) / cached["denoise_s"]

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
