"""VBench's dimensions: what each needs, and why one cannot be evaluated."""

from __future__ import annotations

import pytest

from erta.errors import ErtaError
from experiments.bench.vbench import dimensions

# ---- dimensions


def test_dimensions_by_name_and_all():
    assert len(dimensions.requested("all")) == 16 == len(dimensions.requested(["color", "all"]))
    assert dimensions.requested("color") == ["color"]
    assert dimensions.requested(["scene", "color", "scene"]) == ["scene", "color"]
    for wrong in ("beauty", ["color", "beauty"], 5):
        with pytest.raises(ErtaError, match=r"no dimension (beauty|5)\.\nChoose from subject_consistency,"):
            dimensions.requested(wrong)


def test_missing_files_and_modules_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reasons = dimensions.why_not(list(dimensions.DIMENSIONS), "standard", {"scene": "no fairscale"})
    assert list(dimensions.DIMENSIONS.keys() - reasons.keys()) == ["temporal_flickering"]
    assert str(tmp_path / "amt_model" / "amt-s.pth") in reasons["motion_smoothness"]
    assert "vocab.txt" in reasons["scene"] and reasons["scene"].endswith("; no fairscale")

    # some of the files: what is complete can be evaluated, the rest is named file by file
    for file in ("clip_model/ViT-L-14.pt", "clip_model/ViT-B-32.pt", *dimensions.DIMENSIONS["color"].weights):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"weights")
    raft = tmp_path / "raft_model" / "models" / "raft-things.pth"
    raft.parent.mkdir(parents=True)
    raft.touch()  # what a download leaves that a full disk ended
    names = ["background_consistency", "appearance_style", "aesthetic_quality", "color", "dynamic_degree"]
    reasons = dimensions.why_not(names, "standard", {})
    assert set(reasons) == {"aesthetic_quality", "color", "dynamic_degree"} and str(raft) in reasons["dynamic_degree"]
    assert "ViT-L-14" not in reasons["aesthetic_quality"] and "sa_0_4_vit_l_14_linear" in reasons["aesthetic_quality"]
    vocabulary = tmp_path / "hub" / "models--bert-base-uncased" / "snapshots" / "abc" / "vocab.txt"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text("[PAD]")
    assert dimensions.why_not(["color"], "standard", {}) == {}
    refused = {name: why for name, why in dimensions.why_not(names, "custom", {}).items() if "own prompts" in why}
    assert set(refused) == {"appearance_style", "color"} and "bench=vbench_standard" in refused["color"]
