"""`experiment=compare`: every method of `conf/cache/` in one harness, at equal budgets.

A row is a method at a budget of computed steps: N/2, N/3 and N/4. Methods with a parameter of their own find its
value for the budget on calibration prompts; the forwards of a row are those counted on the test prompts. A method that
cannot run here, or that fails inside the pipeline, leaves a row with the reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments import console, figures
from experiments.ablation import Row, RowArms, comparer, refuse_what_rows_decide, uncached_clips
from experiments.calibrating import progress_bar
from experiments.compare_tables import (
    COLUMNS,
    NO_BUDGET,
    REFERENCE,
    Outcome,
    as_markdown,
    full_forwards,
    not_run,
    point,
    reference_of,
    tabulate,
)
from experiments.methods import CACHES, Arm
from experiments.metrics import Lpips, psnr_db, scene_agreement, ssim
from experiments.models import call_kwargs, load_pipeline
from experiments.prompts import Prompt, test_prompts
from experiments.record import (
    append_line,
    check_inputs,
    describe_inputs,
    describe_run,
    finish,
    read_json,
    read_lines,
    write_json,
)
from experiments.sampling import generate

SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS, QUICK_KNOB_PROMPTS = 8, (2,), 1
SEARCHED = ("budcache", "lemica")  # by hundreds of generations: not in a quick comparison
GRIDS = ("uniform", "lemica", "gcache", "budcache", "meancache")  # whose steps plan_grid tries too, beside the policy's
TIMED, QUICK_TIMED = 8, 4  # prompts of each row whose uncached run is timed right before the cached one
ROWS, ARMS, LEFT_OUT = "rows.jsonl", "arms.jsonl", "left_out.json"


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample, then write `rows.jsonl`, `arms.jsonl`, `comparison.md`, the figures and `record.json`.

    Raises ErtaError at the end if a method failed inside the pipeline; a method that refuses is no failure.
    """
    refuse_what_rows_decide(cfg)
    prompts = test_prompts(cfg)[: QUICK_PROMPTS if cfg.compare.quick else None]
    rows = table_rows(cfg)
    outcomes, failed = sample_all(cfg, folder, rows, prompts)
    tables = tabulate(outcomes)
    about = f"{cfg.model.name}, {len(prompts)} held-out prompts"
    for count, table in tables.items():
        title = f"{about}, {count} of {cfg.model.num_inference_steps} steps"
        console.table(title, list(COLUMNS), [*table, *not_run(outcomes, count)])
    (folder / "comparison.md").write_text(as_markdown(about, tables, outcomes), encoding="utf-8")
    console.note(f"tables: {folder / 'comparison.md'}")
    (folder / "figures").mkdir(exist_ok=True)
    full = full_forwards(outcomes)
    points = [
        point(one, reference_of(one, outcomes)) for one in outcomes if one.samples and not one.reused_nothing(full)
    ]
    for axis, label in (("speedup", "measured speed-up of denoising"), ("forwards", "transformer forwards")):
        figures.pareto(points, axis, label, folder / "figures" / f"psnr_by_{axis}.png")
    record = {
        **describe_run(cfg, [prompt.seed for prompt in prompts], [prompt.text for prompt in prompts]),
        "tables": {str(count): {"columns": list(COLUMNS), "rows": table} for count, table in tables.items()},
        "points": points,
        "not_run": {outcome.row.key: outcome.reason for outcome in outcomes if outcome.reason},
    }
    if cfg.compare.only_finished:
        write_json(folder / "record.json", record)
    else:
        finish(folder, record)
    console.note(f"figures: {folder / 'figures'}")
    if failed:
        raise ErtaError(f"failed inside the pipeline: {', '.join(failed)}. The other rows are in {folder}")


def table_rows(cfg: DictConfig) -> list[Row]:
    """Every method at every budget, the reference first; what knows no budget once.

    Raises ErtaError for a method in `compare.methods` that does not exist.
    """
    known = sorted(path.stem for path in CACHES.glob("*.yaml") if path.stem != NO_BUDGET)
    if unknown := [name for name in cfg.compare.methods if name not in known]:
        raise ErtaError(f"compare.methods: there is no {', '.join(unknown)}. Choose from {', '.join(known)}")
    quick = cfg.compare.quick
    names = list(cfg.compare.methods) or [name for name in known if not (quick and name in SEARCHED)]
    names.sort(key=lambda name: name != REFERENCE)
    counts = [round(cfg.model.num_inference_steps / speedup) for speedup in (QUICK_SPEEDUPS if quick else SPEEDUPS)]
    grids = [name for name in GRIDS if name in names] if "plan_grid" in names and not quick else []
    methods = {name: (f"cache={name}",) for name in names} | {
        f"plan_grid of {name}": ("cache=plan_grid", f"cache.options.of={name}") for name in grids
    }
    searching = (f"calibration.knob_prompts={QUICK_KNOB_PROMPTS}",) if quick else ()
    rows = [Row(name, (*typed, *searching), k) for k in counts for name, typed in methods.items()]
    return [Row(NO_BUDGET, (f"cache={NO_BUDGET}",)), *rows]


def sample_all(
    cfg: DictConfig, folder: Path, rows: list[Row], prompts: list[Prompt]
) -> tuple[list[Outcome], list[str]]:
    """Every row on every prompt, and the rows that failed. What `rows.jsonl` holds already is not made again.

    With `compare.only_finished` nothing is made: rows that are not whole say so, or why they were left out before.
    """
    pipe = load_pipeline(cfg)
    arms = RowArms(pipe)
    check_inputs(folder, describe_inputs(pipe, prompts, arms.calibration(cfg)))
    references = uncached_clips(pipe, cfg, prompts, folder)
    measure = measurer(cfg, folder, pipe, prompts, references)
    done = {(line["row"], line["index"]): line for line in read_lines(folder / ROWS)}
    calibration_s = {line["row"]: line["calibration_s"] for line in read_lines(folder / ARMS)}
    left_out: dict[str, str] = read_json(folder / LEFT_OUT) or {}
    outcomes, failed = [], []
    with progress_bar() as bar:
        task = bar.add_task("rows", total=len(rows) * len(prompts), completed=len(done))
        for row in rows:
            bar.update(task, description=row.key)
            outcome = Outcome(row)
            outcomes.append(outcome)
            missing = [k for k in range(len(prompts)) if (row.key, k) not in done]
            try:
                if missing and cfg.compare.only_finished:
                    unfinished = f"not finished: {len(prompts) - len(missing)} of {len(prompts)} prompts"
                    raise ErtaError(left_out.get(row.key, unfinished))
                if missing:
                    arm = arms.build(row)
                    if row.key not in calibration_s:
                        calibration_s[row.key] = arm.calibration_s
                        about = {"row": row.key, "calibration_s": arm.calibration_s, "report": arm.report}
                        append_line(folder / ARMS, about)
                    for k in missing:
                        done[row.key, k] = {"row": row.key, **measure(arm, k)}
                        append_line(folder / ROWS, done[row.key, k])
                        bar.advance(task)
            except ErtaError as error:
                outcome.reason = str(error)
            except Exception as error:  # a peer's code may raise anything; the row says what
                outcome.reason = f"{type(error).__name__}: {error}".splitlines()[0]
                failed.append(row.key)
            if outcome.reason:
                bar.advance(task, sum((row.key, k) not in done for k in missing))
                if not cfg.compare.only_finished:
                    left_out[row.key] = outcome.reason
                    write_json(folder / LEFT_OUT, left_out)
                console.note(f"{row.key} {'failed' if row.key in failed else 'is left out'}: {outcome.reason}")
                continue
            outcome.samples = [done[row.key, k] for k in range(len(prompts))]
            outcome.calibration_s = calibration_s[row.key]
    return outcomes, failed


def measurer(
    cfg: DictConfig, folder: Path, pipe: Any, prompts: list[Prompt], references: list[np.ndarray]
) -> Callable[[Arm, int], dict[str, Any]]:
    """What measures an arm on the k-th prompt; the first few right after an uncached run."""
    lpips, base, compared = Lpips(), call_kwargs(cfg), comparer(cfg, folder)
    timed = QUICK_TIMED if cfg.compare.quick else TIMED

    def measure(arm: Arm, index: int) -> dict[str, Any]:
        prompt = prompts[index]
        plain = generate(pipe, prompt.text, prompt.seed, base) if index < timed else None
        made = generate(pipe, prompt.text, prompt.seed, arm.kwargs, arm.put_on)
        scene, pair = scene_agreement(prompt, made.frames), compared(made.frames, references[index])
        return {
            "index": index,
            "forwards": made.forwards,
            "denoise_s": made.denoise_s,
            "uncached_s": plain.denoise_s if plain is not None else None,
            "psnr_db": psnr_db(*pair),
            "ssim": ssim(*pair),
            "lpips": None if lpips.missing else lpips(*pair),
            "scene": None if scene is None else scene["all"],
            "cache_bytes": made.cache_bytes,
        }

    return measure
