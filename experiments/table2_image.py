"""`experiment=table2_image`: the paper's Table 2, methods on FLUX.1-dev by FID, CLIP score, LPIPS, SSIM and PSNR.

Claim under test: at no less speed-up ERTACache's images are closer to the uncached ones than TeaCache's; and, by a later paper
that prints the same table, GCache's are closer still. Each pair is decided by the paired 95 % interval of PSNR over prompts.

On `model=flux_dev` the rows run at the printed thresholds or numbers of computed steps; on any other image model at the same
share of its steps: scaled down, beside the paper's numbers and never among them. The paper's CLIP column lies near 1, so it
is not the usual score of image and text (about 30): the two are not compared.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.records import Table
from erta.errors import ErtaError
from experiments.harness.printed import claims_of, rows_of
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

COLUMNS = [
    "paper_speedup", "paper_psnr_db", "paper_ssim", "paper_lpips", "paper_clip_score",
    "forwards", "speedup", "psnr_db_std", "gain", "ssim", "lpips", "fid", "clip_score", "scene",
]  # fmt: skip


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row; write the rows, `table.md` with verdicts and `record.json`, print them."""
    if cfg.model.num_frames is not None:
        raise ErtaError(f"table2_image is about images, and model={cfg.model.name} makes videos: take table1_video")
    table = paper.table("table2_image")
    rows = [Row("uncached, again", "none"), *rows_of(table, cfg.model.name, cfg.model.num_inference_steps)]
    shown = Table(reference="ERTACache", columns=COLUMNS, claims=claims_of(table), source=table.source)
    run_table(cfg, folder, rows, shown)
