"""Open-Sora 1.2's sizes and times: latent frames of a clip, and how far its size shifts the times of the steps."""

from __future__ import annotations

import math

from diffusers import FlowMatchEulerDiscreteScheduler

from erta.errors import ErtaError

MICRO_FRAMES = 17  # the temporal autoencoder sees so many frames at a time
TIME_FACTOR = 4  # and keeps a quarter of them, rounded up
SPACE_FACTOR = 8
BASE_PIXELS = 512**2  # of a picture whose times are not shifted


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip: 5 for every 17 frames. Raises ErtaError for frames that are not whole seventeens."""
    if num_frames < MICRO_FRAMES or num_frames % MICRO_FRAMES:
        near = max(round(num_frames / MICRO_FRAMES), 1) * MICRO_FRAMES
        raise ErtaError(
            f"Open-Sora 1.2 makes clips of a multiple of {MICRO_FRAMES} frames, and {num_frames} is none: take {near}"
        )
    return num_frames // MICRO_FRAMES * math.ceil(MICRO_FRAMES / TIME_FACTOR)


def time_shift(height: int, width: int, num_frames: int) -> float:
    """r of the published shift of a time t in [0, 1], `r t / (1 + (r - 1) t)`: larger clips spend more steps at high noise.

    Args:
        height, width: in pixels, as asked for, whatever the latent holds of them.
    """
    return math.sqrt(height * width / BASE_PIXELS) * math.sqrt(latent_frames(num_frames))


def rectified_flow() -> FlowMatchEulerDiscreteScheduler:
    """The published solver: Euler's steps on the times 1 - i / N, shifted by the size of the clip (see `time_shift`)."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
