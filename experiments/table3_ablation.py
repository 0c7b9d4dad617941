"""`experiment=table3_ablation`: the paper's Table 3 at both sites, with every variant and the uncached baselines.

Claims under test: (1) the offline policy beats uniform reuse, (2) timestep adjustment improves on the policy,
(3) rectification improves on both; and, ours, (4) phi does more than the longer last step that it leads to, where a
grid with that last step and no phi is the control. Each is decided at each site and budget by a paired 95 % interval of PSNR
over prompts, clips of all seeds averaged: *reproduced*, *contradicted*, or *not decidable here*.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from analysis import paper
from analysis.records import Claim, Table
from erta.options import SITES
from experiments.harness.row_sampling import run_table
from experiments.harness.rows import NO_CORRECTOR, Row

SHARES = (0.50, 0.34)  # of the steps are computed: about 2x and 3x
PAPER_ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("uniform", "uniform", ()),
    ("policy", "policy", ()),
    ("policy + time", "policy_time", ()),
    ("all three", "ertacache", ()),
)
VARIANTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("policy by cached residual", "policy", ("cache.rel_l1_denominator=cached",)),
    ("policy + rectification", "policy", ("cache.rectify=true",)),
    ("policy + time, phi by increment", "policy_time", ("cache.phi_denominator=increment",)),
    ("policy + longer last step only", "policy_time", ("cache.time_form=last_step",)),
    ("policy + scalar rectification", "policy", ("cache.rectify=true", "cache.rectifier=scalar")),
    ("policy + literal sigmoid", "policy", ("cache.rectify=true", "cache.rectifier_form=sigmoid")),
    ("policy + closed-loop rectification", "policy", ("cache.rectify=true", "cache.rectifier_fit=closed")),
    ("policy, corrector off", "policy", (NO_CORRECTOR,)),
    ("all three, corrector off", "ertacache", (NO_CORRECTOR,)),
    ("plan grid, no cache", "plan_grid", ()),
)
OUTPUT_ONLY: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("velocity reuse", "policy", ("cache.reuse=velocity",)),
    ("velocity reuse, corrector off", "policy", ("cache.reuse=velocity", NO_CORRECTOR)),
    ("fewer steps", "fewer_steps", ()),
)
PRINTED = paper.data()["table3_ablation"]
CLAIMS = [  # text, better, worse
    ("the policy helps", "policy", "uniform"),
    ("timestep adjustment helps", "policy + time", "policy"),
    ("rectification helps", "all three", "policy + time"),
    ("phi does more than the longer last step", "policy + time", "policy + longer last step only"),
]
TABLE = Table(
    reference="policy",
    columns=[
        "forwards", "speedup", "psnr_db_std", "gain", "ssim", "scene", "scene_change", "last_sigma",
        "paper_psnr_db", "paper_ssim", "paper_lpips", "paper_vbench",
    ],
    claims=[Claim(text=text, better=better, worse=worse) for text, better, worse in CLAIMS],
    source=PRINTED["source"],
)  # fmt: skip


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row; write the rows, `table.md` with the verdicts and `record.json`, print them."""
    run_table(cfg, folder, table_rows(cfg.model.num_inference_steps), TABLE)


def table_rows(num_steps: int) -> list[Row]:
    """Every row at every site and budget, and a second uncached one."""
    rows = [Row("uncached, again", "none")]
    for site in SITES:
        chosen = (*PAPER_ROWS, *VARIANTS, *(OUTPUT_ONLY if site == "output" else ()))
        for share in SHARES:
            count = round(share * num_steps)
            rows += [
                Row(label, method, options, count, site, paper=tuple(PRINTED["rows"].get(label, {}).items()))
                for label, method, options in chosen
            ]
    return rows
