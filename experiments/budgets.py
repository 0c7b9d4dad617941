"""`experiment=budgets`: what each part of ERTACache adds at equal numbers of transformer forwards.

Claim under test (paper, Table 3): policy, timestep adjustment and rectification each improve on the row before.
Rows: fewer steps, the plan's grid without a cache, uniform reuse, and the paper's four, with UniPC's corrector
on and off at reused steps. Every row is compared with the same uncached clips, paired by prompt and seed, and
with `policy`; forwards are counted, not assumed. Two uncached runs give the noise floor.
Finished rows are kept, so the same command goes on after an interruption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict

from erta.calibration import Calibration
from experiments import console
from experiments.calibrating import get_calibration, progress_bar
from experiments.metrics import mean_psnr, paired_interval, psnr_db, scene_agreement, ssim
from experiments.models import call_kwargs, load_pipeline, scheduler_sigmas
from experiments.prompts import Prompt, test_prompts
from experiments.record import (
    SCHEMA,
    append_line,
    check_inputs,
    config_hash,
    describe_inputs,
    environment,
    finish,
    read_lines,
)
from experiments.sampling import generate

BUDGETS = (25, 17, 12)
REFERENCE = "policy"
# label, cache group, overrides of the cache config
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fewer steps", "fewer_steps", {}),
    ("plan grid, no cache", "plan_grid", {}),
    ("uniform", "uniform", {}),
    ("policy", "policy", {}),
    ("policy + time", "policy_time", {}),
    ("policy + rectification", "policy", {"rectify": True}),
    ("all three", "ertacache", {}),
    ("uniform, corrector off", "uniform", {"corrector_at_reused": False}),
    ("policy, corrector off", "policy", {"corrector_at_reused": False}),
    ("policy + time, corrector off", "policy_time", {"corrector_at_reused": False}),
    ("policy + rectification, corrector off", "policy", {"rectify": True, "corrector_at_reused": False}),
    ("all three, corrector off", "ertacache", {"corrector_at_reused": False}),
    ("all three, phi by increment", "ertacache", {"phi_denominator": "increment"}),
    ("velocity reuse", "policy", {"reuse": "velocity"}),
    ("velocity reuse, corrector off", "policy", {"reuse": "velocity", "corrector_at_reused": False}),
)
CONF = Path(__file__).resolve().parents[1] / "conf" / "cache"


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row on every prompt, write `rows.jsonl`, `table.md` and `record.json`, print the table."""
    prompts, pipe = test_prompts(cfg), load_pipeline(cfg)
    calibration = get_calibration(cfg, pipe)
    check_inputs(folder, describe_inputs(pipe, prompts, calibration))
    path = folder / "rows.jsonl"
    done = {(row["row"], row["steps"], row["index"]): row for row in read_lines(path)}
    jobs: list[tuple[str, int, tuple[str, str, dict[str, Any]] | None]] = [
        ("uncached, again", cfg.model.num_inference_steps, None)
    ]
    jobs += [(row[0], steps, row) for steps in BUDGETS for row in ROWS]
    references = _uncached(pipe, cfg, prompts, folder)
    with progress_bar() as bar:
        task = bar.add_task("rows", total=len(jobs) * len(prompts), completed=len(done))
        for label, steps, row in jobs:
            missing = [k for k in range(len(prompts)) if (label, steps, k) not in done]
            if not missing:
                continue
            plan, kwargs = _arm(cfg, pipe, calibration, row, steps)
            for index in missing:
                sample = generate(pipe, prompts[index].text, prompts[index].seed, kwargs, plan)
                done[label, steps, index] = {
                    "row": label,
                    "steps": steps,
                    "index": index,
                    "forwards": sample.forwards,
                    "psnr_db": psnr_db(sample.frames, references[index]),
                    "ssim": ssim(sample.frames, references[index]),
                    "scene": scene_agreement(prompts[index], sample.frames),
                    "last_step": float(scheduler_sigmas(pipe, kwargs["num_inference_steps"])[-2])
                    if plan is None
                    else float(plan.sigmas[-2]),
                }
                append_line(path, done[label, steps, index])
                bar.advance(task)
    uncached_scene = [scene_agreement(p, frames) for p, frames in zip(prompts, references, strict=True)]
    table = _table(list(done.values()), uncached_scene, len(prompts))
    columns = [
        "row",
        "forwards",
        "PSNR dB",
        "± vs policy (95 %)",
        "SSIM",
        "scene, all",
        "± vs uncached (95 %)",
        "last sigma step",
    ]
    console.table(f"{cfg.model.name}, {len(prompts)} held-out prompts", columns, table)
    _write_markdown(folder / "table.md", columns, table)
    finish(
        folder,
        {
            "schema": SCHEMA,
            **environment(),
            "config": OmegaConf.to_container(cfg, resolve=True),
            "config_hash": config_hash(cfg),
            "seeds": [p.seed for p in prompts],
            "prompts": [p.text for p in prompts],
            "table": {"columns": columns, "rows": table},
        },
    )
    console.note(f"table: {folder / 'table.md'}")


def _uncached(pipe: Any, cfg: DictConfig, prompts: list[Prompt], folder: Path) -> list[np.ndarray]:
    """Uncached clips, kept beside the rows so that a continued run compares with the same ones."""
    clips = []
    store = folder / "uncached"
    store.mkdir(exist_ok=True)
    with progress_bar() as bar:
        for index, prompt in enumerate(bar.track(prompts, description="uncached clips")):
            path = store / f"{index:03d}.npy"
            if not path.is_file():
                partial = path.with_suffix(".partial.npy")
                np.save(partial, generate(pipe, prompt.text, prompt.seed, call_kwargs(cfg)).frames)
                partial.replace(path)
            clips.append(np.load(path))
    return clips


def _arm(cfg: DictConfig, pipe: Any, calibration: Calibration, row: tuple | None, steps: int) -> tuple[Any, dict]:
    if row is None:
        return None, call_kwargs(cfg)
    changed = cfg.copy()
    with open_dict(changed):
        defaults = OmegaConf.load(CONF / f"{row[1]}.yaml")
        base = {"adjust_time": False, "rectify": False, "corrector_at_reused": True, "reuse": "residual"}
        changed.cache = OmegaConf.merge(changed.cache, base, defaults, row[2])
        changed.cache.threshold, changed.cache.speedup, changed.cache.steps = None, None, steps
    arm = get_method(changed.cache._target_)(changed, pipe, lambda: calibration)
    return arm.plan, arm.kwargs


def _table(rows: list[dict[str, Any]], uncached_scene: list[dict[str, bool] | None], count: int) -> list[list[str]]:
    def of(label: str, steps: int) -> list[dict[str, Any]]:
        return sorted((r for r in rows if r["row"] == label and r["steps"] == steps), key=lambda r: r["index"])

    table = []
    labels = dict.fromkeys((r["row"], r["steps"]) for r in rows)
    order = {label: k for k, (label, _, _) in enumerate(ROWS)}
    for label, steps in sorted(labels, key=lambda key: (-key[1], order.get(key[0], -1))):
        mine, reference = of(label, steps), of(REFERENCE, steps)
        values = [r["psnr_db"] for r in mine]
        mean, gain = mean_psnr(values), ""
        if reference and label != REFERENCE and None not in values:
            interval = paired_interval(np.array(values) - np.array([r["psnr_db"] for r in reference]))
            gain = f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
        scene = [r["scene"]["all"] for r in mine if r["scene"]]
        scene_gain = ""
        if scene and None not in uncached_scene:
            against = np.array([s["all"] for s in uncached_scene if s], float)
            change = paired_interval(np.array(scene, float) - against)
            scene_gain = f"{change.mean:+.1%} [{change.low:+.1%}, {change.high:+.1%}]"
        table.append(
            [
                f"{label} ({steps})",
                "/".join(str(f) for f in sorted({r["forwards"] for r in mine})),
                "identical" if mean is None else f"{mean:.2f} ± {np.std([v for v in values if v is not None]):.2f}",
                gain,
                f"{np.mean([r['ssim'] for r in mine]):.4f}",
                f"{np.mean(scene):.1%}" if scene else "",
                scene_gain,
                f"{mine[0]['last_step']:.3f}",
            ]
        )
    known = [scene["all"] for scene in uncached_scene if scene]
    if known:
        table.insert(0, ["uncached", "", "", "", "", f"{np.mean(known):.1%}", "", ""])
    return table


def _write_markdown(path: Path, columns: list[str], table: list[list[str]]) -> None:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    path.write_text("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in table)]) + "\n", encoding="utf-8")
