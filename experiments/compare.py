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
    refuse_what_rows_decide,
    uncached_clips,
    write_markdown,
)
from experiments.calibrating import progress_bar
from experiments.methods import Arm
from experiments.metrics import Lpips, mean_psnr, paired_interval, psnr_db, scene_agreement, ssim
from experiments.models import call_kwargs, load_pipeline
from experiments.prompts import Prompt, test_prompts
from experiments.record import append_line, check_inputs, describe_inputs, describe_run, finish, read_lines
from experiments.sampling import generate, now

CACHES = Path(__file__).resolve().parents[1] / "conf" / "cache"
REFERENCE = "ertacache"
NO_BUDGET = "none"  # one row, whatever the budget
SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS = 8, (2,)
SEARCHED = ("budcache", "lemica")  # by hundreds of generations: not in a quick comparison
TIMED = 4  # prompts of each row whose uncached run is timed right before the cached one
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
    "set-up s",
)


@dataclass
class Outcome:
    """A row's samples in the order of the prompts, or why there are none."""

    row: Row
    samples: list[dict[str, Any]] = field(default_factory=list)
    setup_s: float = 0.0
    reason: str | None = None

    def mean(self, key: str) -> float | None:
        """Mean of what the samples know of `key`."""
        known = [one[key] for one in self.samples if one[key] is not None]
        return float(np.mean(known)) if known else None

    @property
    def speedup(self) -> float | None:
        """Ratio of the median denoising times, over the pairs that were timed in turns."""
        pairs = [(one["uncached_s"], one["denoise_s"]) for one in self.samples if one["uncached_s"] is not None]
        if not pairs:
            return None
        uncached, cached = (float(np.median(times)) for times in zip(*pairs, strict=True))
        return uncached / cached

    def reused_nothing(self, full: float | None) -> bool:
        """Whether as many forwards were made as without a cache, `full`."""
        if self.row.computed is None or full is None or not self.samples:
            return False
        return min(one["forwards"] for one in self.samples) > full - 1e-3


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample, then write `rows.jsonl`, `arms.jsonl`, `table.md`, the figures and `record.json`.

    Raises ErtaError at the end if a method failed inside the pipeline; a method that refuses is no failure.
    """
    refuse_what_rows_decide(cfg)
    prompts = test_prompts(cfg)[: QUICK_PROMPTS if cfg.compare.quick else None]
    rows = table_rows(cfg)
    outcomes, failed = sample_all(cfg, folder, rows, prompts)
    tables = tabulate(outcomes)
    for count, table in tables.items():
        title = f"{count} of {cfg.model.num_inference_steps} steps"
        console.table(f"{cfg.model.name}, {len(prompts)} held-out prompts, {title}", list(COLUMNS), table)
        write_markdown(folder / f"table_{count}.md", list(COLUMNS), table, reasons(outcomes, count))
    (folder / "figures").mkdir(exist_ok=True)
    full = full_forwards(outcomes)
    points = [point(outcome) for outcome in outcomes if outcome.samples and not outcome.reused_nothing(full)]
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
    return [Row(NO_BUDGET, (f"cache={NO_BUDGET}",))] + [Row(n, (f"cache={n}",), k) for k in counts for n in names]


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
    setup_s = {line["row"]: line["setup_s"] for line in read_lines(folder / ARMS)}
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
                    started = now()
                    arm = arms.build(row)
                    if row.key not in setup_s:
                        setup_s[row.key] = now() - started
                        append_line(folder / ARMS, {"row": row.key, "setup_s": setup_s[row.key], "report": arm.report})
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
                console.note(f"{row.key} {'failed' if row.key in failed else 'is left out'}: {outcome.reason}")
                continue
            outcome.samples = [done[row.key, k] for k in range(len(prompts))]
            outcome.setup_s = setup_s[row.key]
    return outcomes, failed


def measurer(
    cfg: DictConfig, folder: Path, pipe: Any, prompts: list[Prompt], references: list[np.ndarray]
) -> Callable[[Arm, int], dict[str, Any]]:
    """What measures an arm on the k-th prompt; the first few right after an uncached run."""
    lpips, base, compared = Lpips(), call_kwargs(cfg), comparer(cfg, folder)

    def measure(arm: Arm, index: int) -> dict[str, Any]:
        prompt = prompts[index]
        plain = generate(pipe, prompt.text, prompt.seed, base) if index < TIMED else None
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
        reference = next((o for o in here if o.row.label == REFERENCE and o.samples), None)
        here.sort(key=lambda o: -(o.mean("psnr_db") or -1))
        lines = [*(o for o in outcomes if o.row.computed is None), *here]
        tables[count] = [cells(o, reference, full_forwards(outcomes)) for o in lines]
    return tables


def full_forwards(outcomes: list[Outcome]) -> float | None:
    """Forwards of a run without a cache."""
    return next((o.mean("forwards") for o in outcomes if o.row.label == NO_BUDGET), None)


def cells(outcome: Outcome, reference: Outcome | None, full: float | None) -> list[str]:
    """One line of a table. `full`: the forwards of a run without a cache."""
    samples = outcome.samples
    if not samples or outcome.reused_nothing(full):
        said = "did not reuse anything" if samples else "not run, see below"
        return [outcome.row.label, said, *[""] * (len(COLUMNS) - 2)]
    against = ""
    if reference is not None and reference is not outcome:
        pairs = [(a["psnr_db"], b["psnr_db"]) for a, b in zip(samples, reference.samples, strict=True)]
        if all(value is not None for pair in pairs for value in pair):
            against = interval_text(paired_interval(np.array([a - b for a, b in pairs])), "+.2f")
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
        f"{outcome.setup_s:.1f}",
    ]


def reasons(outcomes: list[Outcome], count: int) -> str:
    """Why rows of a table were not run."""
    return "\n".join(f"- {o.row.label}: {o.reason}" for o in outcomes if o.reason and o.row.computed in (count, None))


def point(outcome: Outcome) -> dict[str, Any]:
    """A row as a point of the figures."""
    means = {key: outcome.mean(key) for key in ("forwards", "psnr_db")}
    return {"method": outcome.row.label, "computed": outcome.row.computed, "speedup": outcome.speedup, **means}
