"""Fewer steps, with another solver too."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_fewer_steps_with_another_solver(command, tmp_path):
    """The uncached run keeps its own solver; the other's grid is recorded. Mutant: both arms under one solver."""
    code, printed = command("cache=fewer_steps", "bench=fidelity", "hydra.run.dir=outputs/a/own")
    assert code == 0, printed
    code, printed = command("cache=fewer_steps_euler", "bench=fidelity", "hydra.run.dir=outputs/a/euler")
    assert code == 0, printed
    own, euler = (
        json.loads((tmp_path / "outputs" / "a" / name / "record.json").read_text()) for name in ("own", "euler")
    )
    assert euler["timing"]["forwards"] == own["timing"]["forwards"] == 6 and euler["steps"]["without_reuse"] == 0
    assert len(euler["sigmas"]) == 4 and euler["metrics"]["psnr_db"] != own["metrics"]["psnr_db"]
    frames = [
        (tmp_path / "outputs" / "a" / name / "samples" / "uncached" / "000.mp4").read_bytes()
        for name in ("own", "euler")
    ]
    assert frames[0] == frames[1]
