"""What `python run.py --help` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GROUPS = ("model", "sampler", "cache", "bench", "experiment")


def help_node(conf: Path) -> dict[str, Any]:
    """For Hydra's `hydra/help` group: every choice of every group of the folder `conf` with its first line."""
    lines = ["python run.py [group=choice ...] [key=value ...]", ""]
    for group in GROUPS:
        lines.append(f"{group}:")
        for path in sorted((conf / group).glob("*.yaml")):
            first = next(
                (line for line in path.read_text().splitlines() if line.startswith("# ") and "@" not in line), "#"
            )
            lines.append(f"  {path.stem:<24} {first[2:]}")
        lines.append("")
    lines += [
        "Keys you will want: model.num_inference_steps, model.guidance_scale, model.path, cache.threshold |",
        "cache.speedup | cache.steps (one of them), calibration.num_prompts, calibration.prompts, calibration.path,",
        "bench.num_prompts, bench.prompts, bench.frames_from, bench.dimensions (of VBench: names or all),",
        "bench.python (its worker's interpreter), seed, resume, wait, hydra.run.dir. An experiment's own keys stand under its name",
        "(compare.quick, compare.workers, train_tiny.steps, …): see conf/experiment/. --cfg job prints the configuration, -m runs a sweep (hydra/launcher=slurm or ray on a cluster), --traceback shows where an error came from.",
    ]
    return {"app_name": "run.py", "header": "", "footer": "", "template": "\n".join(lines).replace("$", "$$")}
