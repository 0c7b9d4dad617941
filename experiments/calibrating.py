"""Find a calibration that fits, or make one; the command `experiment=calibrate`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import erta
from erta.errors import SignatureMismatch
from erta.signature import check_signature, model_signature
from experiments import console
from experiments.models import ASSETS, call_kwargs, load_pipeline, scheduler_sigmas
from experiments.prompts import calibration_prompts
from experiments.record import mark_finished

MADE_HERE = Path("outputs/calibrations")


def progress_bar() -> Progress:
    """The bar of everything that takes longer than five seconds."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console.out)


def expected_signature(cfg: DictConfig, pipe: Any) -> dict[str, Any]:
    """What can be known of a run's signature before its first call, and the size that was asked for."""
    return {
        **model_signature(pipe),
        "sigmas": [float(s) for s in scheduler_sigmas(pipe, cfg.model.num_inference_steps)],
        "guidance_scale": float(cfg.model.guidance_scale),
        "site": cfg.cache.site,
    }


def check_fits(calibration: erta.Calibration, cfg: DictConfig, pipe: Any) -> None:
    """Raise SignatureMismatch if the calibration was made for another model, grid, guidance or size."""
    check_signature(calibration.signature, expected_signature(cfg, pipe))
    asked = _size(cfg)
    made_for = calibration.record.get("size", asked)
    if made_for != asked:
        raise SignatureMismatch("size", made_for, asked)


def get_calibration(cfg: DictConfig, pipe: Any) -> erta.Calibration:
    """The calibration file that was named, else the shipped one, else one made earlier here, else a new one."""
    if cfg.calibration.path is not None:
        calibration = erta.Calibration.load(cfg.calibration.path)
        check_fits(calibration, cfg, pipe)
        return calibration
    wanted = calibration_prompts(cfg)
    made_here = MADE_HERE / f"{cfg.model.name}-{_key(cfg, pipe)}.safetensors"
    for path in (*sorted((ASSETS / cfg.model.name).glob("calibration*.safetensors")), made_here):
        if not path.is_file():
            continue
        try:
            calibration = erta.Calibration.load(path)
            check_fits(calibration, cfg, pipe)
        except erta.ErtaError as error:
            if path == made_here and not isinstance(error, SignatureMismatch):
                console.note(f"{path} cannot be used: {error}")
            continue
        if calibration.record["prompts"] == wanted and calibration.record["window"] == cfg.calibration.window:
            console.note(f"calibration: {path} ({len(wanted)} prompts)")
            return calibration
    return make_calibration(cfg, pipe, made_here)


def make_calibration(cfg: DictConfig, pipe: Any, path: Path) -> erta.Calibration:
    """Calibrate with a progress bar and keep the result at `path`; finished prompts survive an interruption."""
    prompts = calibration_prompts(cfg)
    partial = path.with_name(path.stem + ".unfinished.safetensors")
    done = _finished_part(partial, prompts, cfg, pipe)
    start = len(done.record["prompts"]) if done is not None else 0
    with progress_bar() as bar:
        task = bar.add_task("calibrate", total=len(prompts), completed=start)

        def keep(index: int, so_far: erta.Calibration) -> None:
            _with_size(done.merge(so_far) if done is not None else so_far, cfg).save(partial)
            bar.advance(task)

        if start < len(prompts):
            made = erta.calibrate(
                pipe,
                prompts[start:],
                site=cfg.cache.site,
                window=cfg.calibration.window,
                seed=CALIBRATION_SEED + start,
                on_prompt=keep,
                **call_kwargs(cfg),
            )
            done = _with_size(done.merge(made) if done is not None else made, cfg)
    assert done is not None
    done.save(path)
    partial.unlink(missing_ok=True)
    return done


CALIBRATION_SEED = 1_000_000  # far from every test seed


def run(cfg: DictConfig, folder: Path) -> None:
    """Calibrate, print what can be planned, and where the file is."""
    pipe = load_pipeline(cfg)
    calibration = make_calibration(cfg, pipe, folder / "calibration.safetensors")
    seconds = calibration.record["seconds"]
    counts = sorted({max(1, calibration.num_steps * share // 100) for share in (20, 24, 34, 50, 70)})
    rows = [_planned_row(calibration, steps) for steps in counts]
    console.table(
        "what can be planned", ["computed steps", "speed-up in forwards", "mean reuse error", "rectifier R²"], rows
    )
    console.note(
        f"{len(calibration.record['prompts'])} prompts, {seconds:.0f} s; "
        f"use it with calibration.path={folder / 'calibration.safetensors'}"
    )
    mark_finished(folder)


def _planned_row(calibration: erta.Calibration, steps: int) -> list[str]:
    """What `steps` computed steps would give, or that the window is too short for them."""
    speedup = f"{calibration.num_steps / steps:.2f}"
    try:
        plan = calibration.plan(steps=steps)
    except erta.BudgetError:
        return [str(steps), speedup, "needs a larger calibration.window", ""]
    reused = not all(plan.mask)
    r2 = f"{np.nanmean(calibration.rectifier_r2(plan.mask)):.3f}" if reused else ""
    return [str(steps), speedup, f"{plan.report['reuse_error_mean']:.4f}", r2]


def _finished_part(path: Path, prompts: list[str], cfg: DictConfig, pipe: Any) -> erta.Calibration | None:
    if not path.is_file():
        return None
    try:
        part = erta.Calibration.load(path)
        check_fits(part, cfg, pipe)
    except erta.ErtaError:
        return None
    done = part.record["prompts"]
    return part if done == prompts[: len(done)] and part.record["window"] == cfg.calibration.window else None


def _size(cfg: DictConfig) -> list[int | None]:
    return [cfg.model.height, cfg.model.width, cfg.model.num_frames]


def _with_size(calibration: erta.Calibration, cfg: DictConfig) -> erta.Calibration:
    return erta.Calibration(calibration.statistics, calibration.signature, {**calibration.record, "size": _size(cfg)})


def _key(cfg: DictConfig, pipe: Any) -> str:
    parts = [expected_signature(cfg, pipe), _size(cfg), cfg.calibration.num_prompts, cfg.calibration.window]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
