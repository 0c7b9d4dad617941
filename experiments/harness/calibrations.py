"""Find a calibration that fits, or make one; the command `experiment=calibrate`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import erta
from erta.errors import ErtaError, SignatureMismatch
from erta.guidance import second_scale_of
from erta.signature import check_signature, model_signature
from experiments.harness.config import shard_range
from experiments.models.call import call_grid, call_kwargs, call_sigmas
from experiments.models.load import ASSETS, check_vocabulary
from experiments.output import console
from experiments.output.console import progress_bar
from experiments.prompts.choose import calibration_prompts

MADE_HERE = Path("outputs/calibrations")


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
