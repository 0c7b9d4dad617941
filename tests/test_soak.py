"""Two minutes of the soak (an hour of it by hand: `python -m tests.soak`), and what it counts."""

from __future__ import annotations

import json

import pytest

from tests import soak


@pytest.mark.slow
def test_two_minutes_of_disturbed_runs(tmp_path, weights):
    """Nothing finished lost, no record that differs. Mutants: see tests/experiments/output."""
    job = (*soak.JOB, f"model.path={weights}", "model.num_frames=5")
    assert soak.main(["--minutes", "2", "--out", str(tmp_path), "--", *job]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["rounds"] >= 1 and figures["records compared"] >= figures.get("jobs", 0) and figures["wrong"] == []


def test_times_are_no_part_of_a_record():
    row = {"psnr_db": 1.0, "cached": {"denoise_s": 2.0, "forwards": 3}, "timing": {"x": 1}}
    assert soak.essence(row) == {"psnr_db": 1.0, "cached": {"forwards": 3}}
