"""`experiment=all_tiny`: every table and figure of the paper, scaled down, on the embedded models; then all verdicts.

Each entry is a command of its own and is run as such, in a folder below; `results.md` has all claims. Killed at any point, the
same command goes on; with nothing changed it does nothing. On two CPU cores it takes less than 90 minutes.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from experiments.harness.members import Member, chosen, run_members

VIDEO, IMAGE = "model=wan21_tiny", "model=flux_tiny"
ONE_A_TRY = "calibration.knob_prompts=1"  # for each value that is tried of a method's own parameter
MEMBERS = [  # name, overrides, minutes on two cores
    Member("fig2a_error_profile", ("experiment=fig2a_error_profile", VIDEO), 2),
    Member("fig2b_trajectory_drift", ("experiment=fig2b_trajectory_drift", VIDEO), 2),
    Member("fig3_side_by_side", ("experiment=fig3_side_by_side", VIDEO), 2),
    Member("fig3_side_by_side_images", ("experiment=fig3_side_by_side", IMAGE), 1),
    Member("fig4_ablation_samples", ("experiment=fig4_ablation_samples", VIDEO), 1),
    Member("fig6_channel_errors", ("experiment=fig6_channel_errors", VIDEO), 2),
    Member("table1_video", ("experiment=table1_video", VIDEO, ONE_A_TRY), 8),
    Member("table2_image", ("experiment=table2_image", IMAGE, ONE_A_TRY), 4),
    Member("table3_ablation", ("experiment=table3_ablation", VIDEO, "table3_ablation.seeds=1"), 10),
    Member("calibration_size", ("experiment=calibration_size", VIDEO), 6),
    Member("threshold_sensitivity", ("experiment=threshold_sensitivity", VIDEO), 2),
    Member("pareto", ("experiment=pareto", VIDEO, ONE_A_TRY), 8),
    Member("pareto_images", ("experiment=pareto", IMAGE, ONE_A_TRY), 3),
    Member("long_video", ("experiment=long_video", VIDEO), 4),
    Member("decomposition", ("experiment=decomposition", VIDEO), 4),
    Member("compare_quick", ("experiment=compare", VIDEO, "compare.quick=true"), 6),
    Member("compare_quick_images", ("experiment=compare", IMAGE, "compare.quick=true"), 2),
]


def run(cfg: DictConfig, folder: Path) -> None:
    """Run what is not done yet. Raises what `run_members` raises."""
    run_members(cfg, folder, chosen(MEMBERS, list(cfg.all_tiny.only), "all_tiny.only"))
