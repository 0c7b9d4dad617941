"""What a run comes to, as flat rows: one for a run of `main`, one for each row of a table, and so on by kind of record.

A key that is not known is absent. The rows of a run are the same whether its folder is read, or what it told W&B when it finished.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from analysis import records, verdicts
from analysis.comparison import Comparison, Outcome
from analysis.intervals import paired_interval
from analysis.records import (
    CalibrationRecord,
    DecompositionRecord,
    FigureRecord,
    MainRecord,
    ModelCardRecord,
    Rows,
    SpeedRecord,
)

FACTS = [  # what was run
    "run", "state", "experiment", "kind", "model", "sampler", "cache", "row", "title", "group", "site", "budget", "threshold",
    "seed", "computed", "steps", "forwards", "prompts", "frames_from", "device", "commit", "overrides", "reason",
]  # fmt: skip
METRICS = [  # what came out
    "psnr_db", "psnr_low", "psnr_high", "ssim", "ms_ssim", "lpips", "speedup_denoise", "speedup_possible", "scene_accuracy",
    "scene_accuracy_uncached", "cache_bytes", "calibration_s", "injected", "propagated", "grid", "open_loop_over_total",
    "error_norm", "growth_median", "reuse_error", "rectifier_r2", "parameters", "flops_per_sample",
    "difference", "verdict",
]  # fmt: skip
BUDGETS = ("threshold", "speedup", "steps")
FINISHED, LEFT_OUT, UNFINISHED = "finished", "left out", "unfinished"
Row = dict[str, Any]


def folder_rows(path: Path) -> list[Row]:
    """The rows of a run folder, or of a file of `analysis/data`. Raises RecordError if it holds no whole record."""
    return read_run(path)[0]


def read_run(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of `folder_rows`, and the configuration that they were made with."""
    kept = records.read_kept(path)
    record: Any = kept.record if isinstance(kept, Rows) else kept
    made = _table_rows(kept) if isinstance(kept, Rows) else _rows(kept, path if path.is_dir() else path.parent)
    return [known({**about(record), **row}) for row in made], record.config


def known(row: Row) -> Row:
    """A row without what is not known."""
    return {
        key: value
        for key, value in row.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration with dotted keys; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + str(key)] = json.dumps(value) if isinstance(value, (list, dict)) else value
    return found


def about(record: Any) -> Row:
    """What all rows of a record share."""
    return {"kind": record.kind, "device": record.device, "commit": record.git_commit, **of_config(record.config)}


def of_config(config: dict[str, Any]) -> Row:
    """What a configuration says of a run, under the names of the frame."""
    here = flat(config)
    named = {
        "sampler": "sampler.name",
        "cache": "cache.name",
        "title": "cache.about.title",
        "group": "cache.about.group",
    }
    target = str(here.get("experiment._target_", "")).split(".")  # of earlier versions, which had no name
    return {
        "experiment": here.get("experiment.name") or (target[1].removesuffix("_job") if len(target) > 1 else None),
        "model": here.get("model.name"),
        **{column: here.get(key) for column, key in named.items()},
        "site": here.get("cache.site"),
        "budget": next(
            (f"{key}={here[f'cache.{key}']:g}" for key in BUDGETS if here.get(f"cache.{key}") is not None), None
        ),
        "threshold": here.get("cache.threshold"),
        "seed": here.get("seed"),
        "steps": here.get("model.num_inference_steps"),
    }


@functools.singledispatch
def _rows(record: Any, folder: Path) -> list[Row]:
    """Of a kind that nothing more is known of: the numbers among its metrics, if it has any."""
    metrics = getattr(record, "metrics", None)
    numbers = {key: metrics[key] for key in METRICS if key in metrics} if isinstance(metrics, dict) else {}
    return [{"state": FINISHED, **numbers}]


@_rows.register
def _(record: MainRecord, folder: Path) -> list[Row]:
    metrics = record.metrics
    return [
        {
            "state": FINISHED,
            "threshold": record.plan_report.get("threshold", record.config["cache"].get("threshold")),
            "computed": record.steps.computed,
            "steps": record.steps.total,
            "forwards": record.timing.forwards,
            "prompts": len(record.prompts),
            "psnr_db": metrics["psnr_db"],
            **psnr_interval([line.get("psnr_db") for line in _lines(folder / records.PER_PROMPT)]),
            "ssim": metrics["ssim"],
            "ms_ssim": metrics.get("ms_ssim"),
            "lpips": metrics.get("lpips"),
            "frames_from": metrics.get("frames_from", "decoded"),
            "speedup_denoise": metrics["speedup_denoise"],
            "speedup_possible": metrics.get("speedup_possible"),
            "scene_accuracy": metrics.get("scene_accuracy", {}).get("all"),
            "scene_accuracy_uncached": metrics.get("scene_accuracy_uncached", {}).get("all"),
            "cache_bytes": record.memory.cache_bytes,
            "calibration_s": record.timing.calibration_s,
        }
    ]


@_rows.register
def _(record: FigureRecord, folder: Path) -> list[Row]:
    """A row a claim."""
    return [
        {
            "state": FINISHED,
            "title": one.claim,
            "prompts": len(record.prompts),
            "difference": one.delta,
            "verdict": one.verdict,
        }
        for one in verdicts.results(record)
    ]


@_rows.register
def _(record: DecompositionRecord, folder: Path) -> list[Row]:
    growth = [value for values in record.growth.values() for value in values]
    return [
        {
            "state": FINISHED,
            "computed": None if record.mask is None else sum(record.mask),
            "prompts": len(record.prompts),
            **record.shares,
            "open_loop_over_total": record.open_loop_over_total,
            "error_norm": record.total_norm,
            "growth_median": float(np.median(growth)) if growth else None,
        }
    ]


@_rows.register
def _(record: SpeedRecord, folder: Path) -> list[Row]:
    return [
        {
            "state": FINISHED,
            "computed": record.computed,
            "forwards": record.forwards,
            "speedup_denoise": record.speedup,
            "speedup_possible": record.possible_speedup,
            "cache_bytes": record.cache_bytes,
            "calibration_s": record.calibration_s,
        }
    ]


@_rows.register
def _(record: ModelCardRecord, folder: Path) -> list[Row]:
    """A row a site."""
    counted = {"parameters": record.parameters, "flops_per_sample": record.flops_per_sample}
    rest = {"state": FINISHED, "cache": None, "title": None, "group": None, "budget": None, "threshold": None}
    return [
        {**rest, "row": site, "site": site, **counted, "cache_bytes": size} for site, size in record.cache_bytes.items()
    ]


@_rows.register
def _(record: CalibrationRecord, folder: Path) -> list[Row]:
    """A row a budget that was planned."""
    return [
        {
            "state": FINISHED if one.missing is None else LEFT_OUT,
            "reason": one.missing,
            "row": f"{one.computed} steps",
            "budget": f"steps={one.computed}",
            "computed": one.computed,
            "reuse_error": one.reuse_error,
            "rectifier_r2": one.rectifier_r2,
            "calibration_s": record.calibration.get("seconds"),
        }
        for one in record.planned
    ]


def _table_rows(rows: records.Rows) -> list[Row]:
    comparison = Comparison(rows)
    return [_table_row(outcome, comparison, rows.left_out) for outcome in comparison.outcomes]


def _table_row(outcome: Outcome, comparison: Comparison, left_out: dict[str, str]) -> Row:
    row, record = outcome.row, comparison.record
    found: Row = {
        "experiment": record.experiment,
        "cache": row.method,
        "row": row.key,
        "title": row.title,
        "group": row.group,
        "site": row.site,
        "computed": row.computed,
        "steps": record.num_steps,
        "budget": None if row.computed is None else f"steps={row.computed}",
        "threshold": None,
        "overrides": " ".join(row.overrides) or None,
    }
    if outcome.reason:
        return {**found, "state": LEFT_OUT if row.key in left_out else UNFINISHED, "reason": outcome.reason}
    interval = outcome.interval("psnr_db")
    return {
        **found,
        "state": FINISHED,
        "threshold": outcome.setup.report.get("threshold") if outcome.setup else None,
        "forwards": outcome.forwards,
        "prompts": len(record.prompts) // record.noises,
        "psnr_db": outcome.mean("psnr_db"),
        "psnr_low": interval and interval.low,
        "psnr_high": interval and interval.high,
        "ssim": outcome.mean("ssim"),
        "lpips": outcome.mean("lpips"),
        "speedup_denoise": outcome.speedup,
        "scene_accuracy": outcome.mean("scene"),
        "scene_accuracy_uncached": comparison.uncached_scene(),
        "cache_bytes": max(sample.cache_bytes for sample in outcome.samples),
        "calibration_s": outcome.setup.calibration_s if outcome.setup else None,
    }


def psnr_interval(values: list[float | None]) -> Row:
    """The 95 % interval of the mean over prompts whose samples are not identical."""
    decibels = [value for value in values if value is not None]
    if not decibels:
        return {}
    interval = paired_interval(np.array(decibels))
    return {"psnr_low": interval.low, "psnr_high": interval.high}


def history_rows(history: list[dict[str, Any]]) -> list[Row]:
    """What is known of a run that told W&B samples and no end: a row a row of its table, means over the samples."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in history:
        for key in line:
            before, _, last = key.rpartition("/")
            if last == "ssim":
                inside = f"{before}/" if before else ""
                found.setdefault(before, []).append(
                    {name.removeprefix(inside): value for name, value in line.items() if name.startswith(inside)}
                )
    return [
        {
            **({"row": row} if row else {}),
            "state": UNFINISHED,
            "prompts": len(samples),
            "psnr_db": _mean(samples, "psnr_db"),
            **psnr_interval([sample.get("psnr_db") for sample in samples]),
            **{key: _mean(samples, key) for key in ("ssim", "ms_ssim", "lpips")},
            "forwards": _mean(samples, "forwards" if row else "cached/forwards"),
            "scene_accuracy": _mean(samples, "scene" if row else "cached/scene"),
        }
        for row, samples in found.items()
    ] or [{"state": UNFINISHED}]


def _mean(samples: list[dict[str, Any]], key: str) -> float | None:
    values = [float(sample[key]) for sample in samples if sample.get(key) is not None]
    return float(np.mean(values)) if values else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of samples; none if there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
