"""`experiment=all_tiny`: every table and figure of the paper, scaled down, on the embedded models; then all verdicts.

Each entry is a command of its own and is run as such, in a folder below; `results.md` has all claims. Killed at any point, the
same command goes on; with nothing changed it does nothing. On two CPU cores it takes about 80 minutes.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from experiments.harness.members import Member, chosen, run_members

VIDEO, IMAGE = "model=wan21_tiny", "model=flux_tiny"
ONE_A_TRY = "calibration.knob_prompts=1"  # for each value that is tried of a method's own parameter


def _tiny(name: str, model: str, minutes: float, *scaled_down: str) -> Member:
    return Member(name if model == VIDEO else f"{name}_images", (f"experiment={name}", model, *scaled_down), minutes)


MEMBERS = [  # minutes on two cores; what is scaled down beside the model
    _tiny("fig2a_error_profile", VIDEO, 2.5),
    _tiny("fig2b_trajectory_drift", VIDEO, 2),
    _tiny("fig3_side_by_side", VIDEO, 3, "fig3_side_by_side.timed=2"),
    _tiny("fig3_side_by_side", IMAGE, 1),
    _tiny("fig4_ablation_samples", VIDEO, 2, "fig4_ablation_samples.timed=2"),
    _tiny("fig6_channel_errors", VIDEO, 1, "bench.num_prompts=16"),
    _tiny("table1_video", VIDEO, 6, ONE_A_TRY, "bench.num_prompts=8", "table1_video.timed=3"),
    _tiny("table2_image", IMAGE, 3, ONE_A_TRY, "table2_image.timed=3"),
    _tiny("table3_ablation", VIDEO, 13, "bench.num_prompts=8", "table3_ablation.seeds=1", "table3_ablation.timed=2"),
    _tiny(
        "calibration_size",
        VIDEO,
        6,
        "bench.num_prompts=16",
        "calibration_size.sizes=[1,4,20,64]",
        "calibration_size.timed=1",
    ),
    _tiny("threshold_sensitivity", VIDEO, 5.5, "bench.num_prompts=16", "threshold_sensitivity.timed=2"),
    _tiny("pareto", VIDEO, 7, ONE_A_TRY, "bench.num_prompts=8", "pareto.timed=2"),
    _tiny("pareto", IMAGE, 5, ONE_A_TRY, "pareto.timed=2"),
    _tiny("long_video", VIDEO, 3),
    _tiny("decomposition", VIDEO, 5, "decomposition.growth_prompts=8", "decomposition.growth_directions=2"),
    Member("compare_quick", ("experiment=compare", VIDEO, "compare.quick=true"), 6),
    Member("compare_quick_images", ("experiment=compare", IMAGE, "compare.quick=true"), 2),
]


def run(cfg: DictConfig, folder: Path) -> None:
    """Run what is not done yet. Raises what `run_members` raises."""
    run_members(cfg, folder, chosen(MEMBERS, cfg.all_tiny, "all_tiny"))
