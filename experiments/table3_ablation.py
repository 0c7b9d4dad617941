"""`experiment=table3_ablation`: the paper's Table 3 at both sites, with every variant and the uncached baselines.

Claims under test: (1) the offline policy beats uniform reuse, (2) timestep adjustment improves on the policy,
(3) rectification improves on both; and, ours, (4) phi does more than the longer last step that it leads to, where a
grid with that last step and no phi is the control. Each is decided at each site and budget by a paired 95 % interval of PSNR
over prompts, clips of all seeds averaged: *reproduced*, *contradicted*, or *not decidable here*.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from erta.site import SITES
from experiments.harness.rows import NO_CORRECTOR, Results, Row, columns, sample_rows, tabulate
from experiments.output import console
from experiments.output.run_folder import describe_run, finish, write_markdown

SHARES = (0.50, 0.34)  # of the steps are computed: about 2x and 3x
REFERENCE = "policy"
PAPER_ROWS = (
    ("uniform", ("cache=uniform",)),
    (REFERENCE, ("cache=policy",)),
    ("policy + time", ("cache=policy_time",)),
    ("all three", ("cache=ertacache",)),
)
VARIANTS = (
    ("policy by cached residual", ("cache=policy", "cache.rel_l1_denominator=cached")),
    ("policy + rectification", ("cache=policy", "cache.rectify=true")),
    ("policy + time, phi by increment", ("cache=policy_time", "cache.phi_denominator=increment")),
    ("policy + longer last step only", ("cache=policy_time", "cache.time_form=last_step")),
    ("policy + scalar rectification", ("cache=policy", "cache.rectify=true", "cache.rectifier=scalar")),
    ("policy + literal sigmoid", ("cache=policy", "cache.rectify=true", "cache.rectifier_form=sigmoid")),
    ("policy + closed-loop rectification", ("cache=policy", "cache.rectify=true", "cache.rectifier_fit=closed")),
    ("policy, corrector off", ("cache=policy", NO_CORRECTOR)),
    ("all three, corrector off", ("cache=ertacache", NO_CORRECTOR)),
    ("plan grid, no cache", ("cache=plan_grid",)),
)
OUTPUT_ONLY = (
    ("velocity reuse", ("cache=policy", "cache.reuse=velocity")),
    ("velocity reuse, corrector off", ("cache=policy", "cache.reuse=velocity", NO_CORRECTOR)),
    ("fewer steps", ("cache=fewer_steps",)),
)
CLAIMS = (
    ("the policy helps", REFERENCE, "uniform"),
    ("timestep adjustment helps", "policy + time", REFERENCE),
    ("rectification helps", "all three", "policy + time"),
    ("phi does more than the longer last step", "policy + time", "policy + longer last step only"),
)
PAPER = Path(__file__).parents[1] / "analysis" / "paper_tables.yaml"


def run(cfg: DictConfig, folder: Path) -> None:
    """Sample every row, write `rows.jsonl`, `table.md` and `record.json`, print the table and the verdicts."""
    results = sample_rows(cfg, folder, table_rows(cfg.model.num_inference_steps), cfg.experiment.seeds)
    headings, table = columns(REFERENCE), tabulate(results, REFERENCE)
    said = verdicts(results, cfg.model.num_inference_steps)
    paper = OmegaConf.to_container(OmegaConf.load(PAPER).table3_ablation)
    console.table(f"{cfg.model.name}, {len(results.prompts)} clips a row", headings, table)
    for line in said:
        console.note(line)
    below = "\n".join([*(f"- {line}" for line in said), "", *_paper_lines(paper)])
    write_markdown(folder / "table.md", headings, table, below)
    finish(
        folder,
        {
            **describe_run(
                cfg, [prompt.seed for prompt in results.prompts], [prompt.text for prompt in results.prompts]
            ),
            "table": {"columns": headings, "rows": table},
            "verdicts": said,
            "paper": paper,
        },
    )


def table_rows(num_steps: int) -> list[Row]:
    """Every row at every site and budget; labels name the site where there is one."""
    rows = []
    for site in SITES:
        chosen = (*PAPER_ROWS, *VARIANTS, *(OUTPUT_ONLY if site == "output" else ()))
        for share in SHARES:
            count = round(share * num_steps)
            rows += [Row(label, (*overrides, f"cache.site={site}"), count, site) for label, overrides in chosen]
    return rows


def verdicts(results: Results, num_steps: int) -> list[str]:
    """One sentence for each claim, site and budget."""
    lines = []
    for claim, better, worse in CLAIMS:
        for site in SITES:
            for share in SHARES:
                count = round(share * num_steps)
                keys = [Row(label, (), count, site).key for label in (better, worse)]
                gain = results.psnr_gain(*keys)
                if gain is None:
                    verdict, shown = "not decidable here", "clips are identical"
                else:
                    verdict = (
                        "reproduced" if gain.low > 0 else "contradicted" if gain.high < 0 else "not decidable here"
                    )
                    shown = f"{gain.mean:+.2f} dB [{gain.low:+.2f}, {gain.high:+.2f}]"
                lines.append(f"{claim}, site {site}, {count} of {num_steps} steps: {verdict} ({shown})")
    return lines


def _paper_lines(paper: Any) -> list[str]:
    lines = [f"What the paper prints for Wan2.1 1.3B ({paper['source']}), another model, so no column of ours:", ""]
    names = ("vbench", "lpips", "ssim", "psnr_db")
    lines += ["| row | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {row['row']} | " + " | ".join(str(row[name]) for name in names) + " |" for row in paper["wan21_1_3b"]]
    return lines
