"""The figures of the paper as commands, and what decides their claims."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import fig2a_error_profile, fig2b_trajectory_drift, fig6_channel_errors, long_video
from tests.commands import config, folders

FIGURES = {
    "fig2a_error_profile": {"true": (4, 5), "predicted": (4, 5), "profile": (5,)},
    "fig2b_trajectory_drift": {"drift": None},
    "fig6_channel_errors": {"static": (2, 16), "dynamic": (2, 16), "motion": (4,)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_measured_drawn_and_go_on(command, tmp_path, name):
    """A second call of a killed run measures what is missing alone. Mutant: prompts measured twice."""
    arguments = (f"experiment={name}", "bench.num_prompts=4", "hydra.run.dir=outputs/f/1")
    code, printed = command(*arguments)
    assert code == 0 and "verdict" in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["kind"] == "figure" and record["experiment"] == name and record["date"].startswith("20")
    for key, shape in FIGURES[name].items():
        values = record["series"][key]
        if shape is not None:
            assert np.shape(values) == shape and np.isfinite(values).all()
    assert all(len(claim["values"]) == 4 for claim in record["claims"])
    assert (folder / "figures" / f"{name}.png").stat().st_size > 8000 and "| verdict |" in (
        folder / "table.md"
    ).read_text()
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "finished": False}))
    code, printed = command(*arguments)
    again = (folder / "rows.jsonl").read_text().splitlines()
    assert code == 0 and again[:2] == lines[:2] and len(again) == 4, printed
    assert np.allclose(
        json.loads((folder / "record.json").read_text())["claims"][0]["values"], record["claims"][0]["values"]
    )


@pytest.mark.slow
def test_long_video_is_timed_at_every_size(command, tmp_path):
    sizes = ("long_video.frames=[1,2]", "long_video.sides=[1.5]")
    code, printed = command("experiment=long_video", "bench.num_prompts=2", *sizes)
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    series = json.loads((folder / "record.json").read_text())["series"]["sizes"]
    assert [(one["frames"], one["height"]) for one in series] == [(5, 64), (9, 64), (5, 96)]
    assert all(len(one["speedups"]) == 2 and one["forwards"] == [12, 6] for one in series)
    assert all(1 < one["possible"] < 3 and one["possible"] > 0.9 * np.median(one["speedups"]) for one in series)
    code, printed = command("experiment=long_video", "long_video.sides=[0.5]")
    assert code == 1 and "entry is ≥ 1" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("experiment=fig6_channel_errors", "bench.num_prompts=3"), "at least 4 prompts"),
        (("experiment=fig6_channel_errors", "bench.num_prompts=4", "cache=teacache"), "has no plan"),
        (("experiment=fig2b_trajectory_drift", "cache.site=blocks"), "the arms of this figure decide"),
        (("experiment=threshold_sensitivity", "threshold_sensitivity.thresholds=[-1]"), "each entry is ≥ 0"),
        (("experiment=threshold_sensitivity", "threshold_sensitivity.thresholds=[]"), "must be numbers ≥ 0"),
        (("experiment=table2_image", "model=wan21_tiny", "bench=fidelity"), "makes videos: take table1_video"),
    ],
)
def test_bad_input_is_refused_in_a_line(command, arguments, said):
    code, printed = command(*arguments)
    assert code == 1 and said in printed


@pytest.mark.slow
def test_calibration_sizes(command, tmp_path):
    """Each row is calibrated on its own number of prompts. Mutants: all on the first one's; sizes of nothing taken."""
    given = ("model.num_inference_steps=6", "model.num_frames=5", "calibration.window=4", "bench.num_prompts=2")
    sizes = ("experiment=calibration_size", "calibration_size.sizes=[1,2]", "wandb.mode=disabled")
    code, printed = command(*sizes, *given, "calibration_size.workers=1", quick=False)
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    rows = [json.loads(line) for line in (folder / "setups.jsonl").read_text().splitlines()]
    seconds = {row["row"]: row["calibration_s"] for row in rows}
    assert seconds["2 prompts (3)"] > seconds["1 prompt (3)"] > 0
    samples = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    psnr = {key: [s["psnr_db"] for s in samples if s["row"] == key] for key in seconds}
    assert (
        psnr["1 prompt (3)"] != psnr["2 prompts (3)"]
        and "as good with 1 prompt as with 2, within 0.5 dB" in (folder / "table.md").read_text()
    )
    for wrong, why in (("[0,2]", "each entry is at least 1"), ("[3]", "at least two numbers of prompts")):
        code, printed = command("experiment=calibration_size", f"calibration_size.sizes={wrong}", *given, quick=False)
        assert code == 1 and why in printed


@pytest.mark.slow
def test_side_by_side_shows_kept_samples(command, tmp_path):
    """Samples of every row and the uncached one lie beside the rows, and the sheet is drawn from them again without sampling."""
    from analysis import tables

    code, printed = command(
        "experiment=fig4_ablation_samples", "bench.num_prompts=2", "fig4_ablation_samples.workers=1"
    )
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    kept = {path.parent.name for path in folder.glob("samples/*/001.webp")}
    assert kept == {"uncached", "uniform_2", "policy_2", "policy_time_2", "all_three_2"} or len(kept) == 5, kept
    sheet = folder / "figures" / "side_by_side.png"
    size = sheet.stat().st_size
    sheet.unlink()
    assert tables.main([str(folder)]) == 0 and sheet.stat().st_size == size > 8000


def test_the_profile_decides_by_the_prompts_own_change():
    """The profile is exact, TeaCache's estimate is not. Mutants: predictions swapped; correlation of other prompts."""
    profile = np.array([0.1, 0.2, 0.4, 0.3])
    true = np.stack([profile, profile * 1.1])
    alike, better = fig2a_error_profile.claims(true, true * 1.5, profile)
    assert alike.values == pytest.approx([0.1, 0.1]) and "least 1.000" in alike.ours
    assert better.values == pytest.approx([50.0, 50 - 100 * 0.1 / 1.1], abs=1e-3)


def test_drift_is_taken_at_the_same_sigma():
    """On a straight line from 4 to 0 another grid drifts nowhere. Mutant: the same step in place of the same sigma."""
    nominal = np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32)
    line = [torch.full((2,), 4.0 * float(s) + 1) for s in nominal[1:]]
    grid = np.array([1.0, 0.7, 0.6, 0.1, 0.0], np.float32)
    moved = [torch.full((2,), 4.0 * float(s) + 1) for s in grid[1:]]
    assert fig2b_trajectory_drift.drift(moved, grid, line, nominal) == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert fig2b_trajectory_drift.drift(line, grid, line, nominal)[-1] == 0
    shifted = [x + 1 for x in line]
    assert fig2b_trajectory_drift.drift(shifted, nominal, line, nominal)[-1] == pytest.approx(1.0)
    closer = fig2b_trajectory_drift.claim(np.array([0.2, 0.2]), np.array([0.1, 0.4]))
    assert closer.values == pytest.approx([6.0206, -6.0206], abs=1e-3)


def test_halves_are_compared_with_each_other():
    """A half that differs is told. Mutant: each prompt beside its own half."""
    one, other = np.array([1.0, 2.0, 4.0]), np.array([4.0, 2.0, 1.0])
    still = np.array([True, True, False, False])
    assert fig6_channel_errors.claim(np.stack([one] * 4), still).values == pytest.approx([0.1] * 4)
    assert fig6_channel_errors.claim(np.stack([one, one, other, other]), still).values == pytest.approx([-1.9] * 4)


def test_sizes_begin_with_the_models_own():
    cfg = config("experiment=long_video", "model=wan21_tiny")
    assert long_video.sizes_of(cfg)[:3] == [(9, 64, 64), (17, 64, 64), (33, 64, 64)]
    assert long_video.sizes_of(cfg)[3:] == [(9, 96, 96), (9, 128, 128)]
    images = long_video.sizes_of(config("experiment=long_video", "model=flux_tiny"))
    assert images == [(None, 64, 64), (None, 96, 96), (None, 128, 128)]


def test_a_kept_speed_up_is_judged_in_pairs():
    first = {"frames": 9, "height": 64, "width": 64, "speedups": [2.0, 1.8]}
    (found,) = long_video.claims([first, {**first, "frames": 17, "speedups": [2.0, 1.9]}])
    assert found.values == pytest.approx([0.05, 1.9 / 1.8 - 0.95]) and "17 frames" in found.text
