"""Find a calibration that fits, or make one; the command `experiment=calibrate`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import erta
from erta.errors import ErtaError, SignatureMismatch
from erta.guidance import second_scale_of
from erta.schedule import segments, sources
from erta.signature import check_signature, model_signature
from experiments import console
from experiments.config import shard_range
from experiments.models import ASSETS, call_grid, call_kwargs, call_sigmas, check_vocabulary, load_pipeline
from experiments.prompts import calibration_prompts
from experiments.record import mark_finished, write_json

MADE_HERE = Path("outputs/calibrations")


def progress_bar() -> Progress:
    """The bar of everything that takes longer than five seconds."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console.out)


def expected_signature(cfg: DictConfig, pipe: Any) -> dict[str, Any]:
    """What can be known of a run's signature before its first call, and the size that was asked for."""
    kwargs = call_kwargs(cfg)
    grid = call_grid(pipe, kwargs)
    return {
        **model_signature(pipe),
        "sigmas": [float(s) for s in grid.sigmas],
        "guidance_scale": float(cfg.model.guidance_scale),
        **({} if grid.takeover is None else {"guidance_scale_2": second_scale_of(kwargs), "takeover": grid.takeover}),
        "site": cfg.cache.site,
    }


def check_fits(calibration: erta.Calibration, cfg: DictConfig, pipe: Any) -> None:
    """Raise SignatureMismatch if the calibration was made for another model, grid, guidance or size."""
    check_signature(calibration.signature, expected_signature(cfg, pipe))
    asked = _size(cfg)
    made_for = calibration.record.get("size", asked)
    if made_for != asked:
        raise SignatureMismatch("size", made_for, asked)


def prompts_for(cfg: DictConfig, pipe: Any) -> list[str]:
    """The calibration prompts. Raises ErtaError for a word that the embedded model has never seen."""
    prompts = calibration_prompts(cfg)
    if cfg.model.embedded:
        check_vocabulary(pipe, prompts)
    return prompts


def get_calibration(cfg: DictConfig, pipe: Any) -> erta.Calibration:
    """The calibration file that was named, else the shipped one, else one made earlier here, else a new one."""
    if cfg.calibration.path is not None:
        calibration = erta.Calibration.load(cfg.calibration.path)
        sigmas = call_sigmas(pipe, call_kwargs(cfg))
        if cfg.calibration.allow_interpolation and len(sigmas) - 1 != calibration.num_steps:
            console.note(f"calibration: interpolated from {calibration.num_steps} to {len(sigmas) - 1} steps")
            calibration = erta.interpolate(calibration, sigmas)
        check_fits(calibration, cfg, pipe)
        return calibration
    wanted = prompts_for(cfg, pipe)
    made_here = MADE_HERE / f"{cfg.model.name}-{_key(cfg, pipe, wanted)}.safetensors"
    for path in (*sorted((ASSETS / cfg.model.name).glob("calibration*.safetensors")), made_here):
        if not path.is_file():
            continue
        try:
            calibration = erta.Calibration.load(path)
            check_fits(calibration, cfg, pipe)
        except ErtaError as error:
            if path == made_here and not isinstance(error, SignatureMismatch):
                console.note(f"{path} cannot be used: {error}")
            continue
        if _tried(calibration, wanted) == len(wanted) and calibration.record["window"] == cfg.calibration.window:
            console.note(f"calibration: {path} ({len(wanted)} prompts)")
            return calibration
    return make_calibration(cfg, pipe, made_here)


def make_calibration(cfg: DictConfig, pipe: Any, path: Path) -> erta.Calibration:
    """Calibrate with a progress bar and keep the result at `path`; finished prompts survive an interruption."""
    prompts = prompts_for(cfg, pipe)
    which = shard_range(cfg.calibration.shard, len(prompts))
    prompts = prompts[which.start : which.stop]
    partial = path.with_name(path.stem + ".unfinished.safetensors")
    done = _finished_part(partial, prompts, cfg, pipe)
    start = _tried(done, prompts) if done is not None else 0
    with progress_bar() as bar:
        task = bar.add_task("calibrate", total=len(prompts), completed=start)

        def keep(index: int, so_far: erta.Calibration) -> None:
            _with_size(done.merge(so_far) if done is not None else so_far, cfg).save(partial)
            bar.advance(task)

        if start < len(prompts):
            try:
                made = erta.calibrate(
                    pipe,
                    prompts[start:],
                    site=cfg.cache.site,
                    window=cfg.calibration.window,
                    seed=CALIBRATION_SEED + which.start + start,
                    on_prompt=keep,
                    **call_kwargs(cfg),
                )
                done = _with_size(done.merge(made) if done is not None else made, cfg)
            except erta.NonFiniteError:
                if done is None:
                    raise
                left_out = [*done.record["skipped"], *prompts[start:]]
                done = replace(done, record={**done.record, "skipped": left_out})
    assert done is not None
    done.save(path)
    partial.unlink(missing_ok=True)
    return done


def merge_parts(paths: list[Path]) -> erta.Calibration:
    """One calibration of several files, in the order given. Raises ErtaError for other setups, or a prompt twice."""
    merged = erta.Calibration.load(paths[0])
    for path in paths[1:]:
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


def closed_loop_plan(cfg: DictConfig, pipe: Any, plan: erta.Plan) -> erta.Plan:
    """`plan` with its rectifier fitted along its own trajectory on the calibration prompts; kept for the next run."""
    prompts = prompts_for(cfg, pipe)
    key = hashlib.sha256(json.dumps([plan.to_json(), prompts, _size(cfg), cfg.cache.rectifier]).encode()).hexdigest()
    path = MADE_HERE / f"{cfg.model.name}-closed-{key[:10]}.json"
    if path.is_file():
        return erta.Plan.load(path)
    with progress_bar() as bar:
        task = bar.add_task("fit the rectifier along the plan", total=len(prompts))
        fitted = erta.refit(
            pipe,
            plan,
            prompts,
            seed=CALIBRATION_SEED,
            rectifier=cfg.cache.rectifier,
            on_prompt=lambda index: bar.advance(task),
            **call_kwargs(cfg),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(path)
    return fitted


CALIBRATION_SEED = 1_000_000  # far from every test seed


def run(cfg: DictConfig, folder: Path) -> None:
    """Calibrate, or merge what was; print and write what can be planned, how well it fits, and what it cost."""
    path = folder / "calibration.safetensors"
    if cfg.calibration.parts:
        calibration = merge_parts([Path(part) for part in cfg.calibration.parts])
        calibration.save(path)
    else:
        calibration = make_calibration(cfg, load_pipeline(cfg), path)
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
    write_json(folder / "calibration.json", {"record": calibration.record, "planned": planned})
    console.note(
        f"{len(calibration.record['prompts'])} prompts, {calibration.record['seconds']:.0f} s, "
        f"{path.stat().st_size / 1e6:.1f} MB; use it with calibration.path={path}"
    )
    mark_finished(folder)


def _planned(calibration: erta.Calibration, steps: int) -> dict[str, Any]:
    """What `steps` computed steps would give, step by step where it fits; or why they cannot be had."""
    row: dict[str, Any] = {"computed": steps, "speedup": calibration.num_steps / steps}
    try:
        plan = calibration.plan(steps=steps)
    except erta.BudgetError:
        return {**row, "missing": "needs a larger calibration.window"}
    if all(plan.mask):
        return {**row, "reuse_error": 0.0}
    reused = [(step, step - source - 1) for step, source in enumerate(sources(plan.mask)) if step != source]
    spread = calibration.statistics.rel_l1.std()[0]
    r2 = calibration.rectifier_r2(plan.mask)
    return {
        **row,
        "reuse_error": plan.report["reuse_error_mean"],
        "reuse_error_std": float(np.mean([spread[pair] for pair in reused])),
        "rectifier_r2": float(np.nanmean(r2)),
        "rectifier_r2_by_step": [None if np.isnan(value) else float(value) for value in r2],
        "break_even_generations": calibration.break_even(steps),
    }


def _shown(row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [str(row["computed"]), f"{row['speedup']:.2f}", row["missing"], "", "", ""]
    cells = [str(row["computed"]), f"{row['speedup']:.2f}", f"{row['reuse_error']:.4f}"]
    if "rectifier_r2" not in row:
        return [*cells, "", "", ""]
    generations = f"{row['break_even_generations']:.0f} generations"
    return [*cells, f"{row['reuse_error_std']:.4f}", f"{row['rectifier_r2']:.3f}", generations]


def _finished_part(path: Path, prompts: list[str], cfg: DictConfig, pipe: Any) -> erta.Calibration | None:
    if not path.is_file():
        return None
    try:
        part = erta.Calibration.load(path)
        check_fits(part, cfg, pipe)
    except ErtaError:
        return None
    return part if _tried(part, prompts) and part.record["window"] == cfg.calibration.window else None


def _tried(calibration: erta.Calibration, prompts: list[str]) -> int:
    """How many of these prompts, from the first on, a calibration is made of or had to leave out; 0 if of others."""
    made_of, skipped = calibration.record["prompts"], calibration.record["skipped"]
    count = len(made_of) + len(skipped)
    return count if [p for p in prompts[:count] if p not in skipped] == made_of else 0


def _size(cfg: DictConfig) -> list[int | None]:
    return [cfg.model.height, cfg.model.width, cfg.model.num_frames]


def _with_size(calibration: erta.Calibration, cfg: DictConfig) -> erta.Calibration:
    return erta.Calibration(calibration.statistics, calibration.signature, {**calibration.record, "size": _size(cfg)})


def _key(cfg: DictConfig, pipe: Any, prompts: list[str]) -> str:
    parts = [expected_signature(cfg, pipe), _size(cfg), prompts, cfg.calibration.window]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
