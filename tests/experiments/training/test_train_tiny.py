"""`experiment=train_tiny` from nothing to a pipeline that runs, with a step for each part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.training import image_transformer, image_vae, train_images, train_video, video_transformer, video_vae

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("model", ["wan21_tiny", "flux_tiny"])
def test_a_model_of_the_rich_world_from_nothing(model, device, command, monkeypatch):
    """Mutants: a part of the plain world (its words are missing), a pipeline that is not written where it is not installed."""
    for trainer in (train_video, train_images):
        monkeypatch.setattr(
            trainer, "SETTINGS", {name: replace(one, steps=1) for name, one in trainer.SETTINGS.items()}
        )
    monkeypatch.setattr(video_transformer, "NUM_CLIPS", 100)
    monkeypatch.setattr(image_transformer, "NUM_PICTURES", 100)
    monkeypatch.setattr(video_transformer, "compiled", lambda module: module)
    monkeypatch.setattr(image_transformer, "compiled", lambda module: module)
    monkeypatch.setattr(video_vae, "set_latent_statistics", lambda *_, **__: None)
    monkeypatch.setattr(image_vae, "BATCH_SIZE", 2)
    asked = [
        "experiment=train_tiny", f"model={model}", "model.world=rich", "train_tiny.install=false", f"train_tiny.device={device}",
        "train_tiny.work_dir=work", "train_tiny.batch_size=4", "bench.num_prompts=2",
    ]  # fmt: skip
    code, printed = command(*asked, quick=False)
    assert code == 0 and "written: work/pipeline" in printed, printed
    run = [f"model={model}", "model.path=work/pipeline", "model.world=rich", "bench=fidelity", "bench.num_prompts=2"]
    small = ["calibration.num_prompts=1", "model.num_inference_steps=4", "cache.steps=3", "hydra.run.dir=outputs/run"]
    code, printed = command(*run, *small, quick=False)
    assert code == 0, printed
    rows = [json.loads(line) for line in Path("outputs/run/per_prompt.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all("all" in row["cached"]["scene"] for row in rows)
