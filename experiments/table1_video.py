"""`experiment=table1_video`: the paper's Table 1, methods on video models by VBench, LPIPS, SSIM and PSNR.

Claim under test: at no less speed-up ERTACache's clips are closer to the uncached ones than those of Δ-DiT, T-GATE, PAB,
FasterCache and TeaCache; and, by a later paper that prints the same table, GCache's are closer still. Each pair is decided by
the paired 95 % interval of PSNR over prompts.

On a model of the table (`model=open_sora_12`, `cogvideox_2b` or `wan21`) its own rows run at the printed thresholds, options or
numbers of computed steps. On any other model, all rows run at the same share of its steps: the table scaled down, beside the
paper's numbers and never among them. CogVideoX runs without the timestep adjustment, since its schedulers have no sigmas.
Without `model=` the three models of the table run, one after the other. VBench's total needs `bench=vbench_standard`.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.records import Table
from experiments.harness.config import model_is_asked
from experiments.harness.members import Member, run_members
from experiments.harness.printed import claims_of, rows_of
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import Row

NAME = "table1_video"
COLUMNS = [
    "paper_speedup", "paper_psnr_db", "paper_ssim", "paper_lpips", "paper_vbench",
    "forwards", "speedup", "psnr_db_std", "gain", "ssim", "lpips", "vbench", "vbench_mean", "scene",
]  # fmt: skip


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row; write the rows, `table.md` with verdicts and `record.json`, print them."""
    table = paper.table(NAME)
    if not model_is_asked():
        models = [block.model for block in table.blocks]
        run_members(cfg, folder, [Member(model, (f"experiment={NAME}", f"model={model}")) for model in models])
        return
    rows = [Row("uncached, again", "none"), *rows_of(table, cfg.model.name, cfg.model.num_inference_steps)]
    notes = [block.note for block in table.blocks if block.model == cfg.model.name and block.note]
    shown = Table(
        reference="ERTACache", columns=COLUMNS, claims=claims_of(table), source="; ".join([table.source, *notes])
    )
    run_table(cfg, folder, rows, shown)
