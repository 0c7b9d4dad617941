"""experiment=calibrate, and the calibrations that other experiments find or make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import erta


@pytest.mark.slow
def test_calibration_is_reused_and_resumed(command, tmp_path, monkeypatch):
    code, printed = command("bench=fidelity")
    assert code == 0, printed
    code, printed = command("bench=fidelity", "resume=false", "hydra.run.dir=outputs/y/second", "seed=1")
    assert code == 0 and "calibration: outputs/calibrations" in printed
    (path,) = Path("outputs/calibrations").glob("*.safetensors")
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "model.guidance_scale=3.0")
    assert code == 1 and "guidance_scale was 5.0" in printed and "experiment=calibrate" in printed
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "sampler=flow_match_euler")
    assert code == 1 and "scheduler was" in printed
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "model.height=32")
    assert code == 1 and "size was" in printed
    other = (f"calibration.path={path}", "bench=fidelity", "model.num_inference_steps=5", "cache.steps=3")
    code, printed = command(*other)
    assert code == 1 and "sigmas was" in printed and "experiment=calibrate" in printed
    code, printed = command(*other, "calibration.allow_interpolation=true", "hydra.run.dir=outputs/z/other")
    assert code == 0 and "interpolated from 6 to 5 steps" in printed, printed
    assert json.loads(Path("outputs/z/other/record.json").read_text())["plan_report"]["interpolated_from_steps"] == 6


def test_calibrate_command(command, tmp_path):
    code, printed = command("experiment=calibrate")
    assert code == 0 and "what can be planned" in printed and "generations" in printed
    (path,) = tmp_path.glob("outputs/*/*/calibration.safetensors")
    planned = json.loads(path.with_name("record.json").read_text())["planned"]
    half = next(row for row in planned if row["computed"] == 3)
    assert [value is None for value in half["rectifier_r2_by_step"]].count(True) == 3
    assert half["reuse_error_std"] > 0 and half["break_even_generations"] > 0


@pytest.mark.slow
def test_shards_of_a_calibration_merge_to_the_whole(command, tmp_path):
    """Mutants: noises that start anew in every shard, shards that overlap, parts of another setup merged."""
    four = ("experiment=calibrate", "calibration.num_prompts=4")

    def made(name: str, *arguments: str) -> Path:
        code, printed = command(*four, f"hydra.run.dir=outputs/{name}", *arguments)
        assert code == 0 and "what can be planned" in printed, printed
        assert ("merge calibrations" in printed) == (name == "merged")
        return Path(f"outputs/{name}/calibration.safetensors")

    whole = erta.Calibration.load(made("whole"))
    shards = [made(f"shard{k}", f"calibration.shard={k}/3") for k in (1, 2, 3)]
    merged = erta.Calibration.load(made("merged", f"calibration.parts=[{','.join(map(str, shards))}]"))
    assert merged.record["prompts"] == whole.record["prompts"] and len(whole.record["prompts"]) == 4
    for name, values in merged.statistics.to_arrays().items():
        np.testing.assert_allclose(values, whole.statistics.to_arrays()[name], rtol=1e-9, atol=1e-12, err_msg=name)

    code, printed = command(*four, f"calibration.parts=[{shards[0]},{shards[0]}]")
    assert code == 1 and "already in the parts" in printed
    other = made("other", "calibration.shard=4/4", "model.guidance_scale=3")
    code, printed = command(*four, f"calibration.parts=[{shards[0]},{other}]")
    assert code == 1 and "does not go with" in printed and "guidance_scale" in printed
    for shard in ("0/2", "3/2", "1/9", "half"):
        code, printed = command(*four, f"calibration.shard={shard}")
        assert code == 1 and "calibration.shard must be k/n" in printed
    for elsewhere in ([], ["cache=none"], ["experiment=decomposition"]):
        code, printed = command("calibration.shard=1/2", *elsewhere)
        assert code == 1 and "calibration.shard" in printed and "leave it out" in printed
    code, printed = command(*four, "calibration.shard=1/2", f"calibration.parts=[{shards[0]}]")
    assert code == 1 and "at once" in printed
