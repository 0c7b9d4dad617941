"""`experiment=all_paper`: every table and figure of the paper on its own models; needs a GPU, the weights and days.

The list is that of `experiment=all_tiny`, with Wan2.1 1.3B for videos and FLUX.1-dev for images, or `model=…` for all that it
can make, and with the full comparison. Not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from experiments import all_tiny
from experiments.harness.config import model_is_asked
from experiments.harness.members import Member, chosen, run_members

OWN = {all_tiny.VIDEO: "model=wan21", all_tiny.IMAGE: "model=flux_dev"}


def run(cfg: DictConfig, folder: Path) -> None:
    """Run what is not done yet. Raises what `run_members` raises."""
    asked = cfg.model.name if model_is_asked() else None
    run_members(cfg, folder, chosen(members(asked, cfg.model.num_frames), cfg.all_paper, "all_paper"))


def members(model: str | None, num_frames: int | None) -> list[Member]:
    """The commands on the paper's own models, or on `model` those of its kind: videos, or images for no `num_frames`."""
    kind = all_tiny.IMAGE if num_frames is None else all_tiny.VIDEO
    models = OWN if model is None else {kind: f"model={model}"}
    return [
        replace(one, name=one.name.replace("_quick", ""), overrides=_scaled_up(one.overrides, models))
        for one in all_tiny.MEMBERS
        if any(named in models for named in one.overrides)
    ]


def _scaled_up(overrides: tuple[str, ...], models: dict[str, str]) -> tuple[str, ...]:
    """Experiment and model alone: what else is said scales down."""
    return tuple(models.get(part, part) for part in overrides[:2])
