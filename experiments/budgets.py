"""`experiment=budgets`: what each part of ERTACache adds at equal numbers of transformer forwards.

Claim under test (paper, Table 3): policy, timestep adjustment and rectification each improve on the row before.
Rows: fewer steps, the plan's grid without a cache, uniform reuse, and the paper's four, with UniPC's corrector
on and off at reused steps. Two uncached runs give the noise floor.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from experiments.harness.rows import NO_CORRECTOR, Row, columns, sample_rows, tabulate
from experiments.output import console
from experiments.output.run_folder import describe_run, finish, write_markdown

SHARES = (0.50, 0.34, 0.24)  # of the steps are computed: 25, 17 and 12 of 50
REFERENCE = "policy"
ROWS = (
    ("fewer steps", ("cache=fewer_steps",)),
    ("plan grid, no cache", ("cache=plan_grid",)),
    ("uniform", ("cache=uniform",)),
    (REFERENCE, ("cache=policy",)),
    ("policy + time", ("cache=policy_time",)),
    ("policy + rectification", ("cache=policy", "cache.rectify=true")),
    ("all three", ("cache=ertacache",)),
    ("uniform, corrector off", ("cache=uniform", NO_CORRECTOR)),
    ("policy, corrector off", ("cache=policy", NO_CORRECTOR)),
    ("policy + time, corrector off", ("cache=policy_time", NO_CORRECTOR)),
    ("policy + rectification, corrector off", ("cache=policy", "cache.rectify=true", NO_CORRECTOR)),
    ("all three, corrector off", ("cache=ertacache", NO_CORRECTOR)),
    ("all three, phi by increment", ("cache=ertacache", "cache.phi_denominator=increment")),
    ("velocity reuse", ("cache=policy", "cache.reuse=velocity")),
    ("velocity reuse, corrector off", ("cache=policy", "cache.reuse=velocity", NO_CORRECTOR)),
)


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row on every prompt, write `rows.jsonl`, `table.md` and `record.json`, print the table."""
    rows = [Row("uncached, again", ("cache=none",))]
    counts = [round(share * cfg.model.num_inference_steps) for share in SHARES]
    rows += [Row(label, overrides, count) for count in counts for label, overrides in ROWS]
    results = sample_rows(cfg, folder, rows)
    headings, table = columns(REFERENCE), tabulate(results, REFERENCE)
    console.table(f"{cfg.model.name}, {len(results.prompts)} held-out prompts", headings, table)
    write_markdown(folder / "table.md", headings, table)
    finish(
        folder,
        {
            **describe_run(
                cfg, [prompt.seed for prompt in results.prompts], [prompt.text for prompt in results.prompts]
            ),
            "table": {"columns": headings, "rows": table},
        },
    )
