"""`experiment=speed model=…`: what ERTACache saves on this machine with the real architecture, without its weights.

The plan is timed as a hook that reuses, and as a solver in the scheduler's place (`erta.collapse`), where it is one. A solver with
as many steps that is fitted (`erta.fit`) is timed too. All are run in turns, every other time in the opposite order.

Time and memory of a forward do not depend on the values of the weights, so they are drawn at random and nothing is
downloaded. Pictures are not made: the decoder and the real text encoder are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

import erta
from analysis.records import SpeedRecord
from erta.errors import ErtaError
from erta.pipeline import latent_call
from experiments.harness import catalogue
from experiments.harness.arm import Arm, make_arm
from experiments.harness.generate import needed_s, now
from experiments.harness.setup import Setup
from experiments.methods.common.solvers import scheduler_arm, solver_arm
from experiments.models.untrained import untrained_pipeline
from experiments.output import console, tracking
from experiments.output.console import progress_bar
from experiments.output.provenance import describe_made
from experiments.output.run_folder import finish

PROMPT = "a red circle"  # any words will do


def run(cfg: DictConfig, folder: Path) -> None:
    """Calibrate and fit on one prompt, then generate uncached, cached and with the schedulers in turns, `speed.pairs` times."""
    record = measure(cfg)
    finish(folder, record)
    steps = f"{record.computed} of {cfg.model.num_inference_steps} steps computed, site {cfg.cache.site}"
    console.table(f"{cfg.model.name} with untrained weights: {steps}", ["", "measured"], shown(record))
    console.note(f"record: {folder / 'record.json'}")
    with tracking.start(cfg, folder) as tracker:  # after the clock has stopped
        tracker.finish({key: value for key, value in vars(record).items() if key not in ("config", "versions")})


def measure(cfg: DictConfig) -> SpeedRecord:
    """Medians over the pairs, in seconds and bytes. Raises ErtaError for a method that needs more than a calibration."""
    if not cfg.cache.about.from_calibration:
        planned = [name for name in catalogue.names() if catalogue.facts(name).from_calibration]
        raise ErtaError(
            f"experiment=speed times what is planned from a calibration ({', '.join(planned)}), not cache={cfg.cache.name}"
        )
    setup = Setup(cfg, untrained_pipeline(cfg))
    pipe, kwargs = setup.pipe, setup.kwargs
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {"uncached": None, "cached": None, "scheduler": None, "fitted": None}
    cached: list[dict[str, Any]] = []
    trace: Any = None

    def timed(name: str, one: Arm, seed: int) -> None:
        nonlocal trace
        with one.put_on(pipe) as seen:
            took = generate(pipe, one.kwargs, seed)
        seconds.setdefault(name, []).append(took)
        peaks[name] = _peak_of_last()
        if name == "cached":
            trace = seen
            cached.append(_inside(seen, took))

    with progress_bar() as bar:
        task = bar.add_task("generate", total=3 + 4 * cfg.speed.pairs)
        generate(pipe, {**kwargs, "num_inference_steps": 2})  # warm-up, not measured
        bar.advance(task)
        started = now()
        calibration = erta.calibrate(pipe, [PROMPT], site=cfg.cache.site, window=cfg.calibration.window, **kwargs)
        calibration_s = now() - started
        setup.calibrations[cfg.cache.site] = calibration
        arm = make_arm(setup)
        bar.advance(task)
        arms: dict[str, Arm | None] = {"uncached": Arm(None, kwargs), "cached": arm}
        arms |= {"scheduler": as_scheduler(setup, arm), "fitted": as_fitted(setup, arm.num_computed)}
        bar.advance(task)
        _peak_of_last()
        for seed in range(cfg.speed.pairs):
            for name, one in reversed(arms.items()) if seed % 2 else arms.items():
                if one is not None:
                    timed(name, one, seed)
                bar.advance(task)
    middle = sorted(cached, key=lambda one: one["denoise_s"])[len(cached) // 2]
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    uncached_s = medians["uncached"]
    calls, forwards, forward_s = middle["calls"], middle["forwards"], middle["forward_s"]
    solver_s = max(0.0, uncached_s - calls * forward_s)
    least_s = needed_s(middle["denoise_s"], middle["inside_s"], middle["overhead_s"], solver_s)
    return SpeedRecord(
        **describe_made(cfg),
        pairs=cfg.speed.pairs,
        computed=arm.num_computed,
        uncached_s=uncached_s,
        cached_s=middle["denoise_s"],
        speedup=uncached_s / middle["denoise_s"],
        possible_speedup=uncached_s / least_s,
        forwards_uncached=calls,
        forwards=forwards,
        forward_s=forward_s,
        hook_share=middle["hook_s"] / forward_s,
        scheduler_s=medians.get("scheduler"),
        fitted_s=medians["fitted"],
        fitted_speedup=float(np.median(np.array(seconds["uncached"]) / np.array(seconds["fitted"]))),
        calibration_s=calibration_s,
        calibration_generations=calibration_s / uncached_s,
        cache_bytes=trace.cache_bytes,
        cache_dtype=trace.cache_dtype,
        peak_gpu_bytes=peaks,
    )


def _inside(trace: Any, seconds: float) -> dict[str, Any]:
    """What a cached generation spent where."""
    calls = sum(map(len, trace.executed.values()))
    return {
        "denoise_s": seconds,
        "forward_s": trace.forward_s / trace.transformer.count,
        "hook_s": trace.overhead_s / calls,
        "inside_s": trace.forward_s,
        "overhead_s": trace.overhead_s,
        "forwards": sum(trace.forwards.values()),
        "calls": calls,
    }


def as_scheduler(setup: Setup, arm: Arm) -> Arm | None:
    """The plan as a solver in the scheduler's place; None, with a line that says why, where it is no linear solver."""
    assert arm.plan is not None
    try:
        scheduler = erta.collapse(setup.pipe, arm.plan)
    except ErtaError as error:
        console.note(f"not timed as a scheduler: {error}")
        return None
    return scheduler_arm(setup, scheduler, arm.num_computed, {})


def as_fitted(setup: Setup, count: int) -> Arm:
    """A solver with `count` steps that is fitted to the one prompt: its coefficients do not matter here, their number does."""
    seen = erta.record(setup.pipe, [PROMPT], decode=False, **setup.kwargs)
    options = erta.FitOptions(terms=6, ridge=1e-4, placement="planned", validate=False)
    return solver_arm(setup, erta.fit(setup.pipe, seen, steps=count, options=options))


def shown(record: SpeedRecord) -> list[list[str]]:
    """Rows of the printed table."""
    rows = [
        ["uncached", f"{record.uncached_s:.2f} s, {record.forwards_uncached:g} forwards"],
        ["cached", f"{record.cached_s:.2f} s, {record.forwards:g} forwards"],
        ["speed-up", f"{record.speedup:.3f}x, possible {record.possible_speedup:.3f}x"],
        *([] if record.scheduler_s is None else [scheduler_row(record.scheduler_s, record.uncached_s)]),
        *([] if record.fitted_s is None or record.fitted_speedup is None else [fitted_row(record)]),
        ["one forward", f"{1000 * record.forward_s:.1f} ms"],
        ["hook, share of a forward", f"{100 * record.hook_share:.2f} %"],
        ["calibration of one prompt", f"{record.calibration_generations:.2f} generations"],
        ["cache", f"{record.cache_bytes:,} bytes ({record.cache_dtype or 'empty'})"],
    ]
    peaks = [peak for peak in record.peak_gpu_bytes.values() if peak is not None]
    if peaks:
        rows.append(["peak GPU memory", " → ".join(f"{peak / 2**30:.2f} GiB" for peak in peaks)])
    return rows


def scheduler_row(seconds: float, uncached_s: float) -> list[str]:
    """Of the printed table."""
    return ["the same plan as a scheduler", f"{seconds:.2f} s, {uncached_s / seconds:.3f}x"]


def fitted_row(record: SpeedRecord) -> list[str]:
    """Of the printed table: the speed-up next to what so many steps promise."""
    promised = record.config["model"]["num_inference_steps"] / record.computed
    speedup = record.fitted_speedup or 0.0
    return [
        f"a fitted scheduler of {record.computed} steps",
        f"{record.fitted_s:.2f} s, {speedup:.3f}x, {speedup / promised:.3f} of the {promised:.3f}x of its steps",
    ]


def generate(pipe: Any, kwargs: dict[str, Any], seed: int = 0) -> float:
    """Seconds of one call that ends in latents."""
    started = now()
    pipe(**latent_call(PROMPT, seed, kwargs))
    return now() - started


def _peak_of_last() -> int | None:
    """Most bytes held on the GPU since the last look."""
    if not torch.cuda.is_available():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
