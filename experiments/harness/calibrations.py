"""Find a calibration that fits, or make one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import erta
from erta.errors import ErtaError, SignatureMismatch
from erta.signature import check_signature
from experiments.harness.config import shard_range
from experiments.harness.setup import Setup
from experiments.models.load import ASSETS
from experiments.output import console
from experiments.output.console import progress_bar

MADE_HERE = Path("outputs/calibrations")
CALIBRATION_SEED = 1_000_000  # far from every test seed


def check_fits(calibration: erta.Calibration, setup: Setup) -> None:
    """Raise SignatureMismatch if the calibration was made for another model, grid, guidance or size."""
    check_signature(calibration.signature, setup.signature)
    asked = setup.size
    made_for = calibration.record.get("size", asked)
    if made_for != asked:
        raise SignatureMismatch("size", made_for, asked)


def get_calibration(setup: Setup) -> erta.Calibration:
    """The calibration of `cache.site`, found or made at the first call: the file that was named, else the shipped one, else
    one made earlier here, else a new one.
    """
    site = setup.cfg.cache.site
    if site not in setup.calibrations:
        setup.calibrations[site] = _find_or_make(setup)
    return setup.calibrations[site]


def _find_or_make(setup: Setup) -> erta.Calibration:
    if setup.cfg.calibration.path is not None:
        calibration = erta.Calibration.load(setup.cfg.calibration.path)
        sigmas = setup.grid.sigmas
        if setup.cfg.calibration.allow_interpolation and len(sigmas) - 1 != calibration.num_steps:
            console.note(f"calibration: interpolated from {calibration.num_steps} to {len(sigmas) - 1} steps")
            calibration = erta.interpolate(calibration, sigmas)
        check_fits(calibration, setup)
        return calibration
    wanted = setup.calibration_prompts
    made_here = MADE_HERE / f"{setup.cfg.model.name}-{_key(setup)}.safetensors"
    for path in (*sorted((ASSETS / setup.cfg.model.name).glob("calibration*.safetensors")), made_here):
        if not path.is_file():
            continue
        try:
            calibration = erta.Calibration.load(path)
            check_fits(calibration, setup)
        except ErtaError as error:
            if path == made_here and not isinstance(error, SignatureMismatch):
                console.note(f"{path} cannot be used: {error}")
            continue
        if _tried(calibration, wanted) == len(wanted) and calibration.record["window"] == setup.cfg.calibration.window:
            console.note(f"calibration: {path} ({len(wanted)} prompts)")
            return calibration
    return make_calibration(setup, made_here)


def make_calibration(setup: Setup, path: Path) -> erta.Calibration:
    """Calibrate with a progress bar and keep the result at `path`; finished prompts survive an interruption."""
    prompts = setup.calibration_prompts
    which = shard_range(setup.cfg.calibration.shard, len(prompts))
    prompts = prompts[which.start : which.stop]
    partial = path.with_name(path.stem + ".unfinished.safetensors")
    done = _finished_part(partial, prompts, setup)
    start = _tried(done, prompts) if done is not None else 0
    with progress_bar() as bar:
        task = bar.add_task("calibrate", total=len(prompts), completed=start)

        def keep(index: int, so_far: erta.Calibration) -> None:
            _with_size(done.merge(so_far) if done is not None else so_far, setup).save(partial)
            bar.advance(task)

        if start < len(prompts):
            try:
                made = erta.calibrate(
                    setup.pipe,
                    prompts[start:],
                    site=setup.cfg.cache.site,
                    window=setup.cfg.calibration.window,
                    seed=CALIBRATION_SEED + which.start + start,
                    on_prompt=keep,
                    **setup.kwargs,
                )
                done = _with_size(done.merge(made) if done is not None else made, setup)
            except erta.NonFiniteError:
                if done is None:
                    raise
                left_out = [*done.record["skipped"], *prompts[start:]]
                done = replace(done, record={**done.record, "skipped": left_out})
    assert done is not None
    done.save(path)
    partial.unlink(missing_ok=True)
    return done


def closed_loop_plan(setup: Setup, plan: erta.Plan) -> erta.Plan:
    """`plan` with its rectifier fitted along its own trajectory on the calibration prompts; kept for the next run."""
    prompts = setup.calibration_prompts
    key = hashlib.sha256(
        json.dumps([plan.to_json(), prompts, setup.size, setup.cfg.cache.rectifier]).encode()
    ).hexdigest()
    path = MADE_HERE / f"{setup.cfg.model.name}-closed-{key[:10]}.json"
    if path.is_file():
        return erta.Plan.load(path)
    with progress_bar() as bar:
        task = bar.add_task("fit the rectifier along the plan", total=len(prompts))
        fitted = erta.refit(
            setup.pipe,
            plan,
            prompts,
            seed=CALIBRATION_SEED,
            rectifier=setup.cfg.cache.rectifier,
            on_prompt=lambda index: bar.advance(task),
            **setup.kwargs,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(path)
    return fitted


def _finished_part(path: Path, prompts: list[str], setup: Setup) -> erta.Calibration | None:
    if not path.is_file():
        return None
    try:
        part = erta.Calibration.load(path)
        check_fits(part, setup)
    except ErtaError:
        return None
    return part if _tried(part, prompts) and part.record["window"] == setup.cfg.calibration.window else None


def _tried(calibration: erta.Calibration, prompts: list[str]) -> int:
    """How many of these prompts, from the first on, a calibration is made of or had to leave out; 0 if of others."""
    made_of, skipped = calibration.record["prompts"], calibration.record["skipped"]
    count = len(made_of) + len(skipped)
    return count if [p for p in prompts[:count] if p not in skipped] == made_of else 0


def _with_size(calibration: erta.Calibration, setup: Setup) -> erta.Calibration:
    return erta.Calibration(calibration.statistics, calibration.signature, {**calibration.record, "size": setup.size})


def _key(setup: Setup) -> str:
    parts = [setup.signature, setup.size, setup.calibration_prompts, setup.cfg.calibration.window]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
