"""`experiment=compare`: every method of `conf/cache/` in one harness, at equal budgets.

A row is a method at a budget of computed steps: N/2, N/3 and N/4. Methods with a parameter of their own find its
value for the budget on calibration prompts; the forwards of a row are those counted on the test prompts. A method that
cannot run here, or that fails inside the pipeline, leaves a row with the reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments import console, figures
from experiments.ablation import (
    Row,
    RowArms,
    comparer,
    interval_text,
    markdown,
    refuse_what_rows_decide,
    uncached_clips,
)
from experiments.calibrating import progress_bar
from experiments.methods import Arm
from experiments.metrics import Interval, Lpips, mean_psnr, paired_interval, psnr_db, scene_agreement, ssim
from experiments.models import call_kwargs, load_pipeline
from experiments.prompts import Prompt, test_prompts
from experiments.record import append_line, check_inputs, describe_inputs, describe_run, environment, finish, read_lines
from experiments.sampling import generate

CACHES = Path(__file__).resolve().parents[1] / "conf" / "cache"
REFERENCE = "ertacache"
NO_BUDGET = "none"  # one row, whatever the budget
SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS, QUICK_KNOB_PROMPTS = 8, (2,), 1
SEARCHED = ("budcache", "lemica")  # by hundreds of generations: not in a quick comparison
GRIDS = ("uniform", "lemica", "gcache", "budcache", "meancache")  # whose steps plan_grid tries too, beside the policy's
TIMED, QUICK_TIMED = 8, 4  # prompts of each row whose uncached run is timed right before the cached one
COMPARED = ("psnr_db", "ssim", "lpips", "scene")
ROWS, ARMS = "rows.jsonl", "arms.jsonl"
COLUMNS = (
    "method",
    "forwards",
    "speed-up, measured",
    "PSNR dB",
    f"against {REFERENCE} (95 %)",
    "SSIM",
    "LPIPS",
    "scene, all",
    "cache bytes",
    "calibration s",
)


@dataclass
class Outcome:
    """A row's samples in the order of the prompts, or why there are none."""

    row: Row
    samples: list[dict[str, Any]] = field(default_factory=list)
    calibration_s: float = 0.0
    reason: str | None = None

    def mean(self, key: str) -> float | None:
        """Mean of what the samples know of `key`."""
        known = [one[key] for one in self.samples if one[key] is not None]
        return float(np.mean(known)) if known else None

    @property
    def speedup(self) -> float | None:
        """Median ratio of the denoising times, over the pairs that were timed in turns."""
        ratios = [one["uncached_s"] / one["denoise_s"] for one in self.samples if one["uncached_s"] is not None]
        return float(np.median(ratios)) if ratios else None

    def gain(self, key: str, over: Outcome) -> Interval | None:
        """Paired difference of `key` to another row, 95 % over prompts; None where a sample does not know it."""
        pairs = [(a[key], b[key]) for a, b in zip(self.samples, over.samples, strict=True)]
        if any(value is None for pair in pairs for value in pair):
            return None
        return paired_interval(np.array([float(a) - float(b) for a, b in pairs]))

    def reused_nothing(self, full: float | None) -> bool:
        """Whether as many forwards were made as without a cache, `full`."""
        if self.row.computed is None or full is None or not self.samples:
            return False
        return min(one["forwards"] for one in self.samples) > full - 1e-3


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
    finish(
        folder,
        {
            **describe_run(cfg, [prompt.seed for prompt in prompts], [prompt.text for prompt in prompts]),
            "tables": {str(count): {"columns": list(COLUMNS), "rows": table} for count, table in tables.items()},
            "points": points,
            "not_run": {outcome.row.key: outcome.reason for outcome in outcomes if outcome.reason},
        },
    )
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
    """Every row on every prompt, and the rows that failed. What `rows.jsonl` holds already is not made again."""
    pipe = load_pipeline(cfg)
    arms = RowArms(pipe)
    check_inputs(folder, describe_inputs(pipe, prompts, arms.calibration(cfg)))
    references = uncached_clips(pipe, cfg, prompts, folder)
    measure = measurer(cfg, folder, pipe, prompts, references)
    done = {(line["row"], line["index"]): line for line in read_lines(folder / ROWS)}
    calibration_s = {line["row"]: line["calibration_s"] for line in read_lines(folder / ARMS)}
    outcomes, failed = [], []
    with progress_bar() as bar:
        task = bar.add_task("rows", total=len(rows) * len(prompts), completed=len(done))
        for row in rows:
            bar.update(task, description=row.key)
            outcome = Outcome(row)
            outcomes.append(outcome)
            missing = [k for k in range(len(prompts)) if (row.key, k) not in done]
            try:
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


def tabulate(outcomes: list[Outcome]) -> dict[int, list[list[str]]]:
    """A table for each budget, best PSNR first, below the row without a budget."""
    tables = {}
    for count in sorted({o.row.computed for o in outcomes if o.row.computed is not None}, reverse=True):
        here = [o for o in outcomes if o.row.computed == count]
        here.sort(key=lambda o: -(o.mean("psnr_db") or -1))
        lines = [*(o for o in outcomes if o.row.computed is None), *here]
        reference, full = reference_of(here[0], outcomes), full_forwards(outcomes)
        tables[count] = [cells(o, reference, full) for o in lines if o.samples]
    return tables


def reference_of(outcome: Outcome, outcomes: list[Outcome]) -> Outcome | None:
    """The reference at the budget of a row, if it was run."""
    same = (one for one in outcomes if one.row.label == REFERENCE and one.row.computed == outcome.row.computed)
    return next((one for one in same if one.samples), None)


def full_forwards(outcomes: list[Outcome]) -> float | None:
    """Forwards of a run without a cache."""
    return next((o.mean("forwards") for o in outcomes if o.row.label == NO_BUDGET), None)


def cells(outcome: Outcome, reference: Outcome | None, full: float | None) -> list[str]:
    """One line of a table. `full`: the forwards of a run without a cache."""
    samples = outcome.samples
    if outcome.reused_nothing(full):
        return [outcome.row.label, "did not reuse anything", *[""] * (len(COLUMNS) - 2)]
    against = ""
    if reference is not None and reference is not outcome:
        against = interval_text(outcome.gain("psnr_db", reference), "+.2f")
    psnr, speedup = mean_psnr([one["psnr_db"] for one in samples]), outcome.speedup
    lpips, scene = outcome.mean("lpips"), outcome.mean("scene")
    return [
        outcome.row.label,
        f"{outcome.mean('forwards'):.1f}",
        f"{speedup:.2f}x" if speedup else "",
        "identical" if psnr is None else f"{psnr:.2f}",
        against,
        f"{outcome.mean('ssim'):.4f}",
        "" if lpips is None else f"{lpips:.4f}",
        "" if scene is None else f"{scene:.1%}",
        f"{max(one['cache_bytes'] for one in samples):,}",
        f"{outcome.calibration_s:.0f}",
    ]


def not_run(outcomes: list[Outcome], count: int) -> list[list[str]]:
    """Lines of a table for what has no samples."""
    labels = [o.row.label for o in outcomes if o.reason and o.row.computed in (count, None)]
    return [[label, "not run", *[""] * (len(COLUMNS) - 2)] for label in labels]


def as_markdown(about: str, tables: dict[int, list[list[str]]], outcomes: list[Outcome]) -> str:
    """All tables, each with what was not run and why."""
    run_by = environment()
    text = [f"# {about}", f"`{run_by['command']}`, commit {run_by['git_commit']}, {run_by['device']}."]
    text.append(
        f"Best PSNR first. Forwards are counted, in equivalents of whole ones. Speed-ups are medians over pairs timed in "
        f"turns, one sample after the other. The interval is that of the PSNR's paired difference to {REFERENCE}."
    )
    for count, table in tables.items():
        text += [f"## {count} computed steps", markdown(list(COLUMNS), table).strip()]
        reasons = [f"- {o.row.label}: {o.reason}" for o in outcomes if o.reason and o.row.computed in (count, None)]
        text += ["Not run:", "\n".join(reasons)] if reasons else []
    return "\n\n".join(text) + "\n"


def point(outcome: Outcome, reference: Outcome | None) -> dict[str, Any]:
    """A row as a point of the figures, and all its paired differences to the reference: [mean, low, high]."""
    means = {key: outcome.mean(key) for key in ("forwards", *COMPARED, "cache_bytes")}
    gains = {key: outcome.gain(key, reference) for key in COMPARED} if reference is not None else {}
    return {
        "method": outcome.row.label,
        "computed": outcome.row.computed,
        "speedup": outcome.speedup,
        **means,
        "calibration_s": outcome.calibration_s,
        f"against_{REFERENCE}": {key: [g.mean, g.low, g.high] for key, g in gains.items() if g is not None},
    }
