"""`experiment=fig3_side_by_side`: the paper's Figure 3, samples of ERTACache beside TeaCache's and the uncached ones.

Claim under test: ERTACache's samples are closer to the uncached ones than TeaCache's. Here both get the same number of
computed steps (about 2x), with fewer steps of the solver beside them as what needs no cache; PSNR decides, by its paired
interval over all prompts. The sheet shows the first of them.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.figures import SHOWN_PROMPTS
from analysis.records import Claim, Table
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

SHARE = 0.5  # of the steps are computed
METHODS = {"fewer steps": "fewer_steps", "TeaCache": "teacache", "ERTACache": "ertacache"}
TABLE = Table(
    reference="ERTACache",
    columns=["forwards", "speedup", "psnr_db_std", "gain", "ssim", "lpips", "scene"],
    claims=[
        Claim(
            text="ERTACache is closer to the uncached samples than TeaCache",
            better="ERTACache",
            worse="TeaCache",
            paper=paper.figure("fig3_side_by_side"),
        ),
        Claim(text="ERTACache is closer than fewer steps", better="ERTACache", worse="fewer steps"),
    ],
    figures=["side_by_side"],
)


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row, keep the first samples of each; write the rows, `table.md`, the sheet and `record.json`."""
    count = round(SHARE * cfg.model.num_inference_steps)
    rows = [Row(title, method, computed=count) for title, method in METHODS.items()]
    run_table(cfg, folder, rows, TABLE, shown=SHOWN_PROMPTS)
