"""`experiment=pareto`: quality against speed-up, the main methods at five budgets (the paper shows single points).

Claims under test: at every budget ERTACache is closer to the uncached samples than TeaCache (the paper, at one or two
speed-ups a model) and than fewer steps of the same solver (no paper shows that). `experiment=compare` has every method.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis.records import Claim, Table
from experiments.harness import catalogue
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

SHARES = (0.7, 0.5, 0.34, 0.24, 0.16)  # of the steps are computed
METHODS = ("ertacache", "policy", "teacache", "meancache", "gcache", "fewer_steps", "plan_grid")
RIVALS = {"teacache": "closer at no less speed-up, at one or two budgets a model", "fewer_steps": ""}
TABLE = Table(
    reference="ertacache",
    columns=["forwards", "speedup", "psnr_db", "gain", "ssim", "scene"],
    best_first=True,
    claims=[
        Claim(
            text=f"ERTACache is closer than {catalogue.facts(rival).title}", better="ertacache", worse=rival, paper=said
        )
        for rival, said in RIVALS.items()
    ],
    figures=["methods", "budget_curves"],
)


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row; write the rows, `table.md`, the figures and `record.json`, print the table."""
    counts = [round(share * cfg.model.num_inference_steps) for share in SHARES]
    titles = {name: catalogue.facts(name).title for name in METHODS}
    rows = [Row(name, name, computed=count, title=titles[name]) for count in counts for name in METHODS]
    run_table(cfg, folder, [Row("uncached, again", "none"), *rows], TABLE)
