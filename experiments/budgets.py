"""`experiment=budgets`: what each part of ERTACache adds at equal numbers of transformer forwards.

Claim under test (paper, Table 3): policy, timestep adjustment and rectification each improve on the row before.
Rows: fewer steps, the plan's grid without a cache, uniform reuse, and the paper's four, with UniPC's corrector
on and off at reused steps. Two uncached runs give the noise floor.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis.records import Table
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import NO_CORRECTOR, Row

SHARES = (0.50, 0.34, 0.24)  # of the steps are computed: 25, 17 and 12 of 50
TABLE = Table(
    reference="policy",
    columns=["forwards", "speedup", "psnr_db_std", "gain", "ssim", "scene", "scene_change", "last_sigma"],
)
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("fewer steps", "fewer_steps", ()),
    ("plan grid, no cache", "plan_grid", ()),
    ("uniform", "uniform", ()),
    ("policy", "policy", ()),
    ("policy + time", "policy_time", ()),
    ("policy + rectification", "policy", ("cache.rectify=true",)),
    ("all three", "ertacache", ()),
    ("uniform, corrector off", "uniform", (NO_CORRECTOR,)),
    ("policy, corrector off", "policy", (NO_CORRECTOR,)),
    ("policy + time, corrector off", "policy_time", (NO_CORRECTOR,)),
    ("policy + rectification, corrector off", "policy", ("cache.rectify=true", NO_CORRECTOR)),
    ("all three, corrector off", "ertacache", (NO_CORRECTOR,)),
    ("all three, phi by increment", "ertacache", ("cache.phi_denominator=increment",)),
    ("velocity reuse", "policy", ("cache.reuse=velocity",)),
    ("velocity reuse, corrector off", "policy", ("cache.reuse=velocity", NO_CORRECTOR)),
)


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row on every prompt; write the rows, `table.md` and `record.json`, print the table."""
    counts = [round(share * cfg.model.num_inference_steps) for share in SHARES]
    rows = [Row(label, method, options, count) for count in counts for label, method, options in ROWS]
    run_table(cfg, folder, [Row("uncached, again", "none"), *rows], TABLE)
