"""All finished runs of the main job under a folder as one table: `python -m analysis.runs [outputs]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

from analysis import records


def load_runs(root: str | Path = "outputs") -> pd.DataFrame:
    """One row a finished run: what was run, with what budget, and its metrics.

    Records of other kinds are passed over; a damaged one is named on stderr and passed over too.
    """
    rows = []
    for path in sorted(Path(root).glob("**/record.json")):
        try:
            record = records.read(path)
        except records.RecordError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if isinstance(record, records.MainRecord):
            rows.append({"folder": str(path.parent), **_row(record)})
    return pd.DataFrame(rows)


def _row(record: records.MainRecord) -> dict[str, object]:
    config, metrics = record.config, record.metrics
    return {
        "model": config["model"]["name"],
        "sampler": config["sampler"]["name"],
        "cache": config["cache"]["name"],
        "computed": record.steps.computed,
        "steps": record.steps.total,
        "forwards": record.timing.forwards,
        "prompts": len(record.prompts),
        "psnr_db": metrics["psnr_db"],
        "ssim": metrics["ssim"],
        "ms_ssim": metrics.get("ms_ssim"),
        "lpips": metrics.get("lpips"),
        "frames_from": metrics.get("frames_from", "decoded"),
        "speedup_denoise": metrics["speedup_denoise"],
        "scene_accuracy": metrics.get("scene_accuracy", {}).get("all"),
        "scene_accuracy_uncached": metrics.get("scene_accuracy_uncached", {}).get("all"),
    }


def load_prompts(folder: str | Path) -> pd.DataFrame:
    """One row a prompt of one run, arms as column prefixes (`cached.denoise_s`)."""
    lines = (Path(folder) / records.PER_PROMPT).read_text(encoding="utf-8").splitlines()
    return pd.json_normalize([json.loads(line) for line in lines])


if __name__ == "__main__":
    table = load_runs(*sys.argv[1:2])
    print(table.to_string(index=False, float_format="{:.3f}".format) if len(table) else "no finished runs")
