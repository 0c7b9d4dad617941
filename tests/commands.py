"""The command line in tests: quick settings, run folders, composed configurations."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments.harness.config import CONF

QUICK = [
    "model.num_inference_steps=6",
    "model.height=64",
    "model.width=64",
    "model.num_frames=5",
    "calibration.num_prompts=2",
    "calibration.window=4",
    "bench.num_prompts=3",
    "wandb.mode=disabled",
]


def folders(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in tmp_path.glob("outputs/*/*/state.json"))


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))
