"""Made-up runs of the main job: records, and folders with clips of known grey levels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from analysis import records
from analysis.records import MainRecord, Memory, Steps, Timing
from experiments.output import clips

FRAMES = 4
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def main_record(model: str = "m", **metrics: Any) -> MainRecord:
    """A record with these metrics beside the usual ones."""
    seconds = ("denoise_s", "denoise_uncached_s", "pipeline_s", "pipeline_uncached_s", "forward_s", "solver_step_s")
    seconds += ("calibration_s", "hook_overhead_per_step_s", "hook_overhead_of_forward")
    return MainRecord(
        command="x", git_commit=None, versions={}, device="CPU", config_hash="0",
        config={"model": {"name": model}, "cache": {"name": "c"}, "bench": {"name": "b"}},
        prompts=["a circle"], seeds=[0], steps=Steps(total=2, computed=1, mask=[1, 0], uncached=2), sigmas=[1.0, 0.5, 0.0],
        timing=Timing(**dict.fromkeys(seconds, 1.0), forwards=2, forwards_uncached=4, repeats=1),
        memory=Memory(cache_bytes=0, cache_dtype="", peak_bytes=1), missing={}, plan_report={},
        metrics={"psnr_db": None, "ssim": 1.0, "speedup_denoise": 2.0, "speedup_possible": 2.0, "speedup_pipeline": 1.9, **metrics},
    )  # fmt: skip


def write_clips(
    folder: Path,
    prompts: list[str],
    psnr_db: list[float | None],
    scenes: dict[str, list[bool]] | None = None,
    frames: int = FRAMES,
) -> list[dict[str, Any]]:
    """Clips and their lines: frame k of an uncached clip has the grey level 40 k + 20, cached ones lie 3 above."""
    rows = []
    for index, prompt in enumerate(prompts):
        rows.append({"prompt": prompt, "seed": index, "psnr_db": psnr_db[index], "ssim": 1.0, "index": index})
        for arm, above in (("uncached", 0), ("cached", 3)):
            right = None if scenes is None else {"shape": scenes[arm][index], "all": scenes[arm][index]}
            rows[-1][arm] = {"scene": right}
            (folder / "samples" / arm).mkdir(parents=True, exist_ok=True)
            levels = np.arange(frames)[:, None, None, None] * 40.0 + 20 + above
            pixels = np.broadcast_to(levels / 255, (frames, 48, 64, 3))
            clips.write_animation(pixels, folder / "samples" / arm / f"{index:03d}.webp")
    return rows


def write_run(folder: Path, prompts: list[str], psnr_db: list[float | None], model: str = "m", **kwargs: Any) -> Path:
    """A whole run folder."""
    rows = write_clips(folder, prompts, psnr_db, **kwargs)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / records.PER_PROMPT).write_text(lines, encoding="utf-8")
    record = main_record(model)
    record.missing = {"lpips": "weights not found: /home/somebody/weights"}
    (folder / records.RECORD).write_text(json.dumps(records.to_json(record)), encoding="utf-8")
    return folder
