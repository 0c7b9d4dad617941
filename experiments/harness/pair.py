"""Uncached and cached samples of the same prompts and noise, measured in turns, and what they sum up to."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image

from experiments.bench import fidelity, images
from experiments.bench.fidelity import Lpips
from experiments.bench.scene import scene_agreement
from experiments.bench.vbench import evaluation
from experiments.harness.arm import Arm
from experiments.harness.generate import Sample, generate, possible_speedup
from experiments.models.call import call_kwargs
from experiments.output import clips, console, report, tracking
from experiments.output.clips import to_uint8, write_lossless
from experiments.output.console import progress_bar
from experiments.output.run_folder import append_line, describe_run, read_lines
from experiments.prompts.choose import Prompt
from experiments.scenes import CHANCE_LEVEL

ARMS = ("uncached", "cached")


PER_PROMPT = "per_prompt.jsonl"


def sample_all(
    cfg: DictConfig, pipe: Any, arm: Arm, prompts: list[Prompt], folder: Path, tracker: tracking.Tracker
) -> list[dict[str, Any]]:
    for name in ARMS:
        (folder / "samples" / name).mkdir(parents=True, exist_ok=True)
    rows = read_lines(folder / PER_PROMPT)
    if rows:
        console.note(f"going on in {folder}: {len(rows)} of {len(prompts)} prompts are done")
    lpips = Lpips()
    base = call_kwargs(cfg)
    if len(rows) < len(prompts):  # warm-up, not measured
        generate(pipe, prompts[0].text, 0, {**base, "num_inference_steps": 2})
    with progress_bar() as bar:
        task = bar.add_task("uncached and cached samples", total=len(prompts), completed=len(rows))
        for index, prompt in enumerate(prompts):
            kept = evaluation.clip_name(prompt, index) if cfg.model.num_frames else f"{index:03d}.png"
            is_measured = index < len(rows)
            if is_measured and all((folder / "samples" / name / kept).is_file() for name in ARMS):
                continue
            samples: dict[str, Sample] = {}
            for name in ARMS if index % 2 == 0 else ARMS[::-1]:  # alternating, so that drift hits both
                side = Arm(None, base) if name == "uncached" else arm
                samples[name] = generate(pipe, prompt.text, prompt.seed, side.kwargs, side.put_on)
            compared: dict[str, np.ndarray] = {}
            for name, sample in samples.items():
                mp4 = folder / "samples" / "mp4" / name / f"{index:03d}.mp4"
                compared[name] = clips.frames_of(cfg.bench.frames_from, sample.frames, mp4)
                _keep(sample.frames, folder / "samples" / name / kept, cfg.model.fps)
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


def _keep(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write a sample without loss beyond 8 bits: clips as mp4, images as png."""
    if path.suffix == ".png":
        Image.fromarray(to_uint8(frames[0])).save(path)
    else:
        write_lossless(frames, path, fps)


def score_images(cfg: DictConfig, prompts: list[Prompt], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """FID and CLIP score of both arms, or why not."""
    if cfg.bench.image_scores:
        return images.score(cfg, folder, prompts)
    names = ("fid_inception", "fid_tinyclip", "clip_score_vit", "clip_score_tinyclip")
    return {}, dict.fromkeys(names, f"bench={cfg.bench.name} does not ask for it: bench=fid_clip, on images, does")


def summarise(
    cfg: DictConfig, pipe: Any, arm: Arm, rows: list[dict[str, Any]], vbench: evaluation.Evaluation
) -> dict[str, Any]:
    timing = _timing(cfg, arm, rows)
    metrics, missing = fidelity.summarise(rows)
    metrics["frames_from"] = cfg.bench.frames_from
    metrics["speedup_denoise"] = timing["denoise_uncached_s"] / timing["denoise_s"]
    metrics["speedup_pipeline"] = timing["pipeline_uncached_s"] / timing["pipeline_s"]
    metrics["speedup_possible"] = timing.pop("speedup_possible")
    if rows[0]["cached"]["scene"] is not None:
        metrics["scene_accuracy"] = _scene_accuracy(rows, "cached")
        metrics["scene_accuracy_uncached"] = _scene_accuracy(rows, "uncached")
        metrics["scene_chance_level"] = CHANCE_LEVEL
    else:
        missing["scene_accuracy"] = "the prompts are not of the scene world"
    if rows[0]["cached"]["mask"] is not None and timing["hook_overhead_per_step_s"] == 0:
        missing["hook_overhead"] = "another library's hooks: their own time is not told apart from the model's"
    vbench_metrics, not_evaluated = vbench.summarise()
    metrics |= vbench_metrics
    missing |= not_evaluated
    mask = rows[0]["cached"]["mask"] or [1] * arm.kwargs["num_inference_steps"]
    return {
        **describe_run(cfg, [row["seed"] for row in rows], [row["prompt"] for row in rows]),
        "steps": {
            "total": len(mask),
            "computed": _whole(_computed_steps(cfg, arm, rows)),
            "mask": mask,
            "uncached": cfg.model.num_inference_steps,
            "without_reuse": sum(row["cached"]["without_reuse"] for row in rows),
        },
        "sigmas": [float(s) for s in arm.sigmas(pipe)],
        "timing": timing,
        "memory": {
            "cache_bytes": max(row["cached"]["cache_bytes"] for row in rows),
            "cache_dtype": rows[0]["cached"]["cache_dtype"],
            "peak_bytes": _peak_bytes(),
        },
        "metrics": metrics,
        "missing": missing,
        "plan_report": arm.plan.report if arm.plan is not None else arm.report,
    }


def _timing(cfg: DictConfig, arm: Arm, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the paired runs, and what as many forwards as the cached ones made can reach at most."""

    def median(name: str, key: str) -> float:
        return float(np.median([row[name][key] for row in rows]))

    steps = cfg.model.num_inference_steps
    forward_s = median("uncached", "forward_s") / steps  # all guidance branches
    solver_s = max(median("uncached", "denoise_s") / steps - forward_s, 0.0)
    branches, forwards = _branches(cfg, rows), _forwards(rows)
    cached_steps = arm.kwargs["num_inference_steps"]
    possible = possible_speedup(steps, forwards / branches, forward_s, solver_s, cached_steps)
    calls = sum(row["cached"]["overhead_calls"] for row in rows)
    overhead_s = sum(row["cached"]["overhead_s"] for row in rows) / calls if calls else 0.0
    return {
        "denoise_s": median("cached", "denoise_s"),
        "denoise_uncached_s": median("uncached", "denoise_s"),
        "pipeline_s": median("cached", "pipeline_s"),
        "pipeline_uncached_s": median("uncached", "pipeline_s"),
        "forward_s": forward_s / branches,
        "solver_step_s": solver_s,
        "calibration_s": arm.calibration_s,
        "hook_overhead_per_step_s": overhead_s * branches,
        "hook_overhead_of_forward": overhead_s / (forward_s / branches),
        "forwards": _whole(forwards),
        "forwards_uncached": rows[0]["uncached"]["forwards"],
        "repeats": len(rows),
        "speedup_possible": possible,
    }


def _computed_steps(cfg: DictConfig, arm: Arm, rows: list[dict[str, Any]]) -> float:
    """Steps with a forward in each guidance branch: as planned, or the mean of what an online rule really made."""
    if arm.attach is None:
        return arm.num_computed
    return _forwards(rows) / _branches(cfg, rows)


def _branches(cfg: DictConfig, rows: list[dict[str, Any]]) -> float:
    """Guidance branches: forwards of an uncached step."""
    return rows[0]["uncached"]["forwards"] / cfg.model.num_inference_steps


def _forwards(rows: list[dict[str, Any]]) -> float:
    """Forwards of a cached sample, mean over prompts."""
    return float(np.mean([row["cached"]["forwards"] for row in rows]))


def _whole(value: float) -> float | int:
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
