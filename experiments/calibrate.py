"""`experiment=calibrate`: a calibration, or several shards of one merged, and what can be planned from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

import erta
from analysis.records import CalibrationRecord, Planned
from erta.errors import ErtaError
from erta.policy import segments, sources
from experiments.harness.calibrations import make_calibration
from experiments.harness.setup import Setup
from experiments.harness.steps import profile
from experiments.output import console, tracking
from experiments.output.provenance import describe_made
from experiments.output.run_folder import finish


def merge_parts(paths: list[Path]) -> erta.Calibration:
    """One calibration of several files, in the order given. Raises ErtaError for other setups, or a prompt twice."""
    with console.progress_bar() as bar:
        return _merged(paths, bar.track(paths[1:], description="merge calibrations", total=len(paths) - 1))


def _merged(paths: list[Path], others: Iterable[Path]) -> erta.Calibration:
    merged = erta.Calibration.load(paths[0])
    for path in others:
        part = erta.Calibration.load(path)
        twice = {*merged.record["prompts"]} & {*part.record["prompts"]}
        if twice:
            raise ErtaError(f"{path}: {sorted(twice)[0]!r} is already in the parts before it")
        for field in ("size", "dtype"):  # the signature does not hold them
            if part.record.get(field) != merged.record.get(field):
                both = f"{merged.record.get(field)} and {part.record.get(field)}"
                raise ErtaError(f"{path} does not go with {paths[0]}: {field} {both}")
        try:
            merged = merged.merge(part)
        except ErtaError as error:
            raise ErtaError(f"{path} does not go with {paths[0]}: {error}") from error
    return merged


def run(cfg: DictConfig, folder: Path) -> None:
    """Calibrate, or merge what was; print and write what can be planned, how well it fits, and what it cost."""
    path = folder / "calibration.safetensors"
    if cfg.calibration.parts:
        calibration = merge_parts([Path(part) for part in cfg.calibration.parts])
        calibration.save(path)
    else:
        calibration = make_calibration(Setup(cfg), path)
    total = calibration.num_steps
    least = len(segments(total, calibration.takeover))
    counts = sorted({max(least, total * share // 100) for share in (20, 24, 34, 50, 70)})
    planned = [_planned(calibration, steps) for steps in counts]
    columns = [
        "computed steps",
        "speed-up in forwards",
        "mean reuse error",
        "± over prompts and branches",
        "rectifier R²",
        "pays after",
    ]
    console.table("what can be planned", columns, [_shown(row) for row in planned])
    finish(folder, CalibrationRecord(**describe_made(cfg), calibration=calibration.record, planned=planned))
    with tracking.start(cfg, folder) as tracker:
        lines = enumerate(zip(*profile(calibration), strict=True))
        tracker.table("relative_change", ["step", "mean", "std"], [[step, *line] for step, line in lines])
        tracker.finish({"prompts": len(calibration.record["prompts"]), "seconds": calibration.record["seconds"]})
    console.note(
        f"{len(calibration.record['prompts'])} prompts, {calibration.record['seconds']:.0f} s, "
        f"{path.stat().st_size / 1e6:.1f} MB; use it with calibration.path={path}"
    )


def _planned(calibration: erta.Calibration, steps: int) -> Planned:
    """What `steps` computed steps would give, step by step where it fits; or why they cannot be had."""
    speedup = calibration.num_steps / steps
    try:
        plan = calibration.plan(steps=steps)
    except erta.BudgetError:
        return Planned(computed=steps, speedup=speedup, missing="needs a larger calibration.window")
    if all(plan.mask):
        return Planned(computed=steps, speedup=speedup, reuse_error=0.0)
    reused = [(step, step - source - 1) for step, source in enumerate(sources(plan.mask)) if step != source]
    spread = calibration.statistics.rel_l1.std()[0]
    deviation = float(np.mean([spread[pair] for pair in reused]))
    r2 = calibration.rectifier_r2(plan.mask)
    return Planned(
        computed=steps,
        speedup=speedup,
        reuse_error=plan.report["reuse_error_mean"],
        reuse_error_std=None if np.isnan(deviation) else deviation,
        rectifier_r2=float(np.nanmean(r2)),
        rectifier_r2_by_step=[None if np.isnan(value) else float(value) for value in r2],
        break_even_generations=calibration.break_even(steps),
    )


def _shown(row: Planned) -> list[str]:
    if row.missing is not None:
        return [str(row.computed), f"{row.speedup:.2f}", row.missing, "", "", ""]
    cells = [str(row.computed), f"{row.speedup:.2f}", f"{row.reuse_error:.4f}"]
    if row.rectifier_r2 is None:
        return [*cells, "", "", ""]
    deviation = "" if row.reuse_error_std is None else f"{row.reuse_error_std:.4f}"
    return [*cells, deviation, f"{row.rectifier_r2:.3f}", f"{row.break_even_generations:.0f} generations"]
