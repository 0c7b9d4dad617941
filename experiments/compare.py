"""`experiment=compare`: every method of `conf/cache/` in one harness, at equal budgets.

A row is a method at a budget of computed steps: N/2, N/3 and N/4. Methods with a parameter of their own find its
value for the budget on calibration prompts; the forwards of a row are those counted on the test prompts. A method that
cannot run here, or that fails inside the pipeline, leaves a row with the reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
from experiments.side_by_side import Event, do_all, share_cores

SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS, QUICK_KNOB_PROMPTS = 8, (2,), 1
SEARCHED = ("budcache", "lemica")  # by hundreds of generations: not in a quick comparison
GRIDS = ("uniform", "lemica", "gcache", "budcache", "meancache")  # whose steps plan_grid tries too, beside the policy's
TIMED, QUICK_TIMED = 6, 4  # prompts of each row whose uncached run is timed right before the cached one
ROWS, ARMS, LEFT_OUT = "rows.jsonl", "arms.jsonl", "left_out.json"
SET_UP, SAMPLED, LEFT, FAILED = "set up", "sampled", "is left out", "failed"  # what happens to a row
Work = list[tuple[Row, tuple[int, ...]]]


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample, then write `rows.jsonl`, `arms.jsonl`, `comparison.md`, the figures and `record.json`.

    Raises ErtaError at the end if a method failed inside the pipeline; a method that refuses is no failure.
    """
    refuse_what_rows_decide(cfg)
    prompts = test_prompts(cfg)[: QUICK_PROMPTS if cfg.compare.quick else None]
    rows, workers = table_rows(cfg), share_cores(cfg.compare.workers)
    outcomes, failed = sample_all(cfg, folder, rows, prompts, workers)
    tables = tabulate(outcomes)
    about = f"{cfg.model.name}, {len(prompts)} held-out prompts"
    for count, table in tables.items():
        title = f"{about}, {count} of {cfg.model.num_inference_steps} steps"
        console.table(title, list(COLUMNS), [*table, *not_run(outcomes, count)])
    (folder / "comparison.md").write_text(as_markdown(about, tables, outcomes, workers), encoding="utf-8")
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
        "workers": workers,
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


def pieces_of(rows: list[Row]) -> list[list[Row]]:
    """Rows that use what one method searched stay together; the longest pieces first, so that none ends alone."""
    pieces: dict[str, list[Row]] = {}
    for row in rows:
        method = row.label.removeprefix("plan_grid of ")
        pieces.setdefault(REFERENCE if method == "plan_grid" else method, []).append(row)
    return sorted(pieces.values(), key=lambda piece: (piece[0].label not in SEARCHED, -len(piece)))


def sample_all(
    cfg: DictConfig, folder: Path, rows: list[Row], prompts: list[Prompt], workers: int
) -> tuple[list[Outcome], list[str]]:
    """Every row on every prompt, and the rows that failed. What `rows.jsonl` holds already is not made again.

    With `compare.only_finished` nothing is made: rows that are not whole say so, or why they were left out before.
    """
    pipe = load_pipeline(cfg)
    check_inputs(folder, describe_inputs(pipe, prompts, RowArms(pipe).calibration(cfg)))
    done = {(line["row"], line["index"]): line for line in read_lines(folder / ROWS)}
    calibration_s = {line["row"]: line["calibration_s"] for line in read_lines(folder / ARMS)}
    left_out: dict[str, str] = read_json(folder / LEFT_OUT) or {}
    missing = {row.key: [k for k in range(len(prompts)) if (row.key, k) not in done] for row in rows}
    events: Iterable[Event] = ()
    if not cfg.compare.only_finished:
        uncached_clips(pipe, cfg, prompts, folder)
        todo = [[(row, tuple(missing[row.key])) for row in piece if missing[row.key]] for piece in pieces_of(rows)]
        events = do_all(workers, [piece for piece in todo if piece], sampler, cfg, folder, prompts)
    failed = []
    with progress_bar() as bar:
        task = bar.add_task("rows", total=len(rows) * len(prompts), completed=len(done))
        for event in events:
            bar.update(task, description=event.row)
            if event.kind == SAMPLED:
                done[event.row, event.about["index"]] = event.about
                missing[event.row].remove(event.about["index"])
                append_line(folder / ROWS, event.about)
                bar.advance(task)
            elif event.kind == SET_UP and event.row not in calibration_s:
                calibration_s[event.row] = event.about["calibration_s"]
                append_line(folder / ARMS, event.about)
            elif event.kind in (LEFT, FAILED):
                left_out[event.row] = event.about["reason"]
                write_json(folder / LEFT_OUT, left_out)
                failed += [event.row] if event.kind == FAILED else []
                console.note(f"{event.row} {event.kind}: {left_out[event.row]}")
                bar.advance(task, len(missing[event.row]))
    outcomes = []
    for row in rows:
        if missing[row.key]:
            unfinished = f"not finished: {len(prompts) - len(missing[row.key])} of {len(prompts)} prompts"
            outcomes.append(Outcome(row, reason=left_out.get(row.key, unfinished)))
            if cfg.compare.only_finished:
                console.note(f"{row.key} {LEFT}: {outcomes[-1].reason}")
        else:
            samples = [done[row.key, k] for k in range(len(prompts))]
            outcomes.append(Outcome(row, samples, calibration_s[row.key]))
    return outcomes, failed


def sampler(cfg: DictConfig, folder: Path, prompts: list[Prompt]) -> Callable[[Work], Iterator[Event]]:
    """What samples rows, given with the numbers of the prompts that are missing, on a pipeline of its own."""
    pipe = load_pipeline(cfg)
    arms, measure = RowArms(pipe), measurer(cfg, folder, pipe, prompts)

    def sample(piece: Work) -> Iterator[Event]:
        for row, missing in piece:
            try:
                arm = arms.build(row)
                about = {"row": row.key, "calibration_s": arm.calibration_s, "report": arm.report}
                yield Event(SET_UP, row.key, about)
                for index in missing:
                    yield Event(SAMPLED, row.key, {"row": row.key, **measure(arm, index)})
            except ErtaError as error:
                yield Event(LEFT, row.key, {"reason": str(error)})
            except Exception as error:  # a peer's code may raise anything; the row says what
                yield Event(FAILED, row.key, {"reason": f"{type(error).__name__}: {error}".splitlines()[0]})

    return sample


def measurer(cfg: DictConfig, folder: Path, pipe: Any, prompts: list[Prompt]) -> Callable[[Arm, int], dict[str, Any]]:
    """What measures an arm on the k-th prompt; the first few right after an uncached run."""
    lpips, base, compared = Lpips(), call_kwargs(cfg), comparer(cfg)
    references = uncached_clips(pipe, cfg, prompts, folder)
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
