"""`experiment=compare`: every method of `conf/cache/` in one harness, at equal budgets.

A row is a method at a budget of computed steps: N/2, N/3 and N/4. Methods with a parameter of their own find its
value for the budget on calibration prompts; the forwards of a row are those counted on the test prompts. A method that
cannot run here, or that fails inside the pipeline, leaves a row with the reason, and the others go on.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import plots
from erta.errors import ErtaError
from experiments.harness.arm import CACHES
from experiments.harness.comparison import (
    COLUMNS,
    DIFFERENCES,
    NO_BUDGET,
    REFERENCE,
    as_markdown,
    differences,
    full_forwards,
    not_run,
    point,
    reference_of,
    tabulate,
)
from experiments.harness.row_sampling import sample_all, uncached_scene
from experiments.harness.rows import Row, check_what_rows_share
from experiments.output import console
from experiments.output.run_folder import describe_run, finish, write_json
from experiments.prompts.choose import test_prompts

SPEEDUPS = (2, 3, 4)
QUICK_PROMPTS, QUICK_SPEEDUPS, QUICK_KNOB_PROMPTS = 8, (2,), 1
SEARCHED = ("budcache", "lemica")  # by hundreds of generations: not in a quick comparison
GRIDS = ("uniform", "lemica", "gcache", "budcache", "meancache")  # whose steps plan_grid tries too, beside the policy's
# Methods that compute their first steps as published stand a second time without that: on a shifted grid those steps
# hardly differ, and take up to half of a budget.
NO_WARMUP = {
    "dbcache": "cache.options.warmup=1",
    "dbcache_taylor": "cache.options.warmup=1",
    "dicache": "cache.options.retention=0",
    "easycache": "cache.options.warmup=1",
    "magcache": "cache.options.retention=0",
    "sencache": "cache.options.first=null",
}


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample, then write `rows.jsonl`, `arms.jsonl`, `comparison.md`, the figures and `record.json`.

    Raises ErtaError at the end if a method failed inside the pipeline; a method that refuses is no failure.
    """
    check_what_rows_share(cfg)
    prompts = test_prompts(cfg)[: QUICK_PROMPTS if cfg.compare.quick else None]
    outcomes, failed = sample_all(cfg, folder, table_rows(cfg), prompts)
    tables = tabulate(outcomes, uncached_scene(folder, prompts))
    paired = {count: differences(outcomes, count) for count in tables}
    about = f"{cfg.model.name}, {len(prompts)} held-out prompts"
    for count, table in tables.items():
        title = f"{about}, {count} of {cfg.model.num_inference_steps} steps"
        console.table(title, list(COLUMNS), [*table, *not_run(outcomes, count)])
    (folder / "comparison.md").write_text(as_markdown(about, tables, paired, outcomes), encoding="utf-8")
    console.note(f"tables: {folder / 'comparison.md'}")
    (folder / "figures").mkdir(exist_ok=True)
    full = full_forwards(outcomes)
    points = [
        point(one, reference_of(one, outcomes)) for one in outcomes if one.samples and not one.reused_nothing(full)
    ]
    for axis, label in (("speedup", "measured speed-up of denoising"), ("forwards", "transformer forwards")):
        plots.pareto(points, axis, label, folder / "figures" / f"psnr_by_{axis}.png")
    record = {
        **describe_run(cfg, [prompt.seed for prompt in prompts], [prompt.text for prompt in prompts]),
        "tables": {str(count): {"columns": list(COLUMNS), "rows": table} for count, table in tables.items()},
        "differences": {str(count): {"columns": list(DIFFERENCES), "rows": table} for count, table in paired.items()},
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
    methods: dict[str, tuple[str, ...]] = {name: (f"cache={name}",) for name in names}
    methods |= {f"plan_grid of {name}": ("cache=plan_grid", f"cache.options.of={name}") for name in grids}
    if not quick:
        methods |= {f"{n}, no warm-up": (f"cache={n}", less) for n, less in NO_WARMUP.items() if n in names}
    searching = (f"calibration.knob_prompts={QUICK_KNOB_PROMPTS}",) if quick else ()
    rows = [Row(name, (*typed, *searching), k) for k in counts for name, typed in methods.items()]
    return [Row(NO_BUDGET, (f"cache={NO_BUDGET}",)), *rows]
