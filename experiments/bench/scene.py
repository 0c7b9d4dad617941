"""Whether a sample of the scene world shows what its prompt asked for."""

from __future__ import annotations

import numpy as np

from experiments.prompts.choose import Prompt
from experiments.scenes import agreement, read_clip


def scene_agreement(prompt: Prompt, clip: np.ndarray) -> dict[str, bool] | None:
    """What the scene checker finds right, by attribute that was asked for; None for prompts that are not of the scene world."""
    return None if prompt.scene is None else agreement(prompt.scene, read_clip(clip, prompt.scene.world))
