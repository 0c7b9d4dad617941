"""All finished runs under a folder as one table: `python -m analysis.runs [outputs]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

SCHEMA = "erta.record/1"


def load_runs(root: str | Path = "outputs") -> pd.DataFrame:
    """One row a finished run: what was run, with what budget, and its metrics. Other files are passed over."""
    rows = []
    for path in sorted(Path(root).glob("**/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("schema") != SCHEMA or "metrics" not in record:
            continue
        config, metrics, steps = record["config"], record["metrics"], record["steps"]
        rows.append(
            {
                "folder": str(path.parent),
                "model": config["model"]["name"],
                "sampler": config["sampler"]["name"],
                "cache": config["cache"]["name"],
                "computed": steps["computed"],
                "steps": steps["total"],
                "forwards": record["timing"]["forwards"],
                "prompts": len(record["prompts"]),
                "psnr_db": metrics["psnr_db"],
                "ssim": metrics["ssim"],
                "ms_ssim": metrics.get("ms_ssim"),
                "lpips": metrics.get("lpips"),
                "frames_from": metrics.get("frames_from", "decoded"),
                "speedup_denoise": metrics["speedup_denoise"],
                "scene_accuracy": metrics.get("scene_accuracy", {}).get("all"),
                "scene_accuracy_uncached": metrics.get("scene_accuracy_uncached", {}).get("all"),
            }
        )
    return pd.DataFrame(rows)


def load_prompts(folder: str | Path) -> pd.DataFrame:
    """One row a prompt of one run, arms as column prefixes (`cached.denoise_s`)."""
    lines = (Path(folder) / "per_prompt.jsonl").read_text(encoding="utf-8").splitlines()
    return pd.json_normalize([json.loads(line) for line in lines])


if __name__ == "__main__":
    table = load_runs(*sys.argv[1:2])
    print(table.to_string(index=False, float_format="{:.3f}".format) if len(table) else "no finished runs")
