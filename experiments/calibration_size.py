"""`experiment=calibration_size`: how many calibration prompts ERTACache needs (appendix A.2 of the paper; reviewers asked).

Claim under test: 20 prompts do as well as 1000. Here the largest of `calibration_size.sizes` stands for 1000, and "as well" is
"at most `MARGIN_DB` behind, by the paired interval over test prompts". A further claim, ours: one prompt does as well as 20.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.records import Claim, Table
from erta.errors import ErtaError
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

SHARE = 0.5  # of the steps are computed
PAPER_SIZE = 20
MARGIN_DB = 0.5


def run(cfg: DictConfig, folder: Path) -> None:
    """A row a size; write the rows, `table.md`, the curve and `record.json`. Raises ErtaError for sizes that mean nothing."""
    sizes = sorted(set(cfg.calibration_size.sizes))
    if len(sizes) < 2 or sizes[0] < 1:
        raise ErtaError(f"calibration_size.sizes must be at least two numbers of prompts ≥ 1, not {sizes}")
    count = round(SHARE * cfg.model.num_inference_steps)
    rows = [Row(_label(n), "ertacache", (f"calibration.num_prompts={n}",), count) for n in sizes]
    run_table(cfg, folder, [Row("uncached, again", "none"), *rows], _table(sizes))


def _table(sizes: list[int]) -> Table:
    middle = min(sizes[:-1], key=lambda n: abs(n - PAPER_SIZE))
    pairs = [(middle, sizes[-1], paper.figure("calibration_size"))]
    pairs += [(sizes[0], middle, "")] if sizes[0] != middle else []
    return Table(
        reference=_label(sizes[-1]),
        columns=["forwards", "psnr_db_std", "gain", "ssim", "scene", "calibration_s"],
        claims=[
            Claim(
                text=f"as good with {_label(few)} as with {many}, within {MARGIN_DB} dB",
                better=_label(few),
                worse=_label(many),
                margin=MARGIN_DB,
                paper=said,
            )
            for few, many, said in pairs
        ],
        figures=["calibration_size"],
    )


def _label(count: int) -> str:
    return f"{count} prompt{'s' if count > 1 else ''}"
