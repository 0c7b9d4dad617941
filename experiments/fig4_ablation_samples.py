"""`experiment=fig4_ablation_samples`: the paper's Figure 4, samples of its ablation's rows side by side.

Claim under test: each component (offline policy, timestep adjustment, rectification) brings the samples closer to the uncached
ones. PSNR decides, by its paired interval over all prompts; the sheet shows the first of them. `experiment=table3_ablation`
has the same rows with every variant.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.figures import SHOWN_PROMPTS
from analysis.records import Claim, Table
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row
from experiments.table3_ablation import CLAIMS, PAPER_ROWS

SHARE = 0.34  # of the steps are computed: about 3x, where differences can be seen
SHOWN_ROWS = [label for label, *_ in PAPER_ROWS]
TABLE = Table(
    reference="policy",
    columns=["forwards", "speedup", "psnr_db_std", "gain", "ssim", "lpips", "scene"],
    claims=[
        Claim(text=text, better=better, worse=worse, paper=paper.figure("fig4_ablation_samples"))
        for text, better, worse in CLAIMS
        if {better, worse} <= set(SHOWN_ROWS)
    ],
    figures=["side_by_side"],
)


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row, keep the first samples of each; write the rows, `table.md`, the sheet and `record.json`."""
    count = round(SHARE * cfg.model.num_inference_steps)
    rows = [Row(label, method, options, count) for label, method, options in PAPER_ROWS]
    run_table(cfg, folder, rows, TABLE, shown=SHOWN_PROMPTS)
