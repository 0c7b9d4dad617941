"""`experiment=threshold_sensitivity`: what the threshold λ decides (reviewers asked; the paper gives one value a model).

For each of `threshold_sensitivity.thresholds`, ERTACache's forwards, speed-up and PSNR. Nothing is printed to compare with.
Claim under test, ours: the next smaller threshold brings the samples closer to the uncached ones. The greedy rule is not
monotone: a larger threshold can compute more steps.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from omegaconf import DictConfig

from analysis.records import Claim, Table
from erta.errors import ErtaError
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

BLOCK = "thresholds"


def run(cfg: DictConfig, folder: Path) -> None:
    """A row a threshold; write the rows, `table.md`, the curves and `record.json`. Raises ErtaError for none, or one below 0."""
    thresholds = sorted(set(cfg.threshold_sensitivity.thresholds))
    if not thresholds or thresholds[0] < 0:
        raise ErtaError(f"threshold_sensitivity.thresholds must be numbers ≥ 0, not {thresholds}")
    rows = [Row(_label(value), "ertacache", (f"cache.threshold={value:g}",), block=BLOCK) for value in thresholds]
    table = Table(
        reference=_label(thresholds[0]),
        columns=["forwards", "speedup", "psnr_db_std", "gain", "ssim", "scene"],
        claims=[
            Claim(text=f"{_label(low)} is closer than {high:g}", better=_label(low), worse=_label(high))
            for low, high in itertools.pairwise(thresholds)
        ],
        figures=["threshold_sensitivity"],
    )
    run_table(cfg, folder, [Row("uncached, again", "none"), *rows], table)


def _label(threshold: float) -> str:
    return f"λ = {threshold:g}"
