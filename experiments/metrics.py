"""Metrics of a cached clip against its uncached twin, on floats in [0, 1], before any encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from experiments.prompts import Prompt
from experiments.scenes import agreement, read_clip

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def psnr_db(clip: np.ndarray, reference: np.ndarray) -> float | None:
    """PSNR of the mean squared error over all frames of a sample; None if the clips are identical."""
    mse = float(np.mean((clip.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return None if mse == 0 else float(-10 * np.log10(mse))


def ssim(clip: np.ndarray, reference: np.ndarray) -> float:
    """SSIM per frame (Gaussian window 11x11, data range 1), mean over frames."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) for x in (clip, reference))
    return float(structural_similarity_index_measure(a, b, data_range=1.0, kernel_size=11, sigma=1.5))


def scene_agreement(prompt: Prompt, clip: np.ndarray) -> dict[str, bool] | None:
    """What the scene checker finds right, by attribute; None for prompts that are not of the scene world."""
    return None if prompt.scene is None else agreement(prompt.scene, read_clip(clip))


class Lpips:
    """LPIPS (alex) from a local AlexNet; `missing` says what was looked for if it is not there."""

    def __init__(self) -> None:
        self.file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
        self.missing = None if self.file.is_file() else f"AlexNet weights not found: {self.file}"
        self._net: torch.nn.Module | None = None

    def __call__(self, clip: np.ndarray, reference: np.ndarray) -> float:
        """Mean over frames. Frames below 64 pixels a side are too small for AlexNet."""
        return float(np.mean(self.by_frame(clip, reference)))

    def by_frame(self, clip: np.ndarray, reference: np.ndarray) -> list[float]:
        """LPIPS of every frame of (frames, height, width, 3) in [0, 1]."""
        if self._net is None:
            import lpips

            self._net = lpips.LPIPS(net="alex", verbose=False).eval()
        a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) * 2 - 1 for x in (clip, reference))
        with torch.no_grad():
            return self._net(a, b).reshape(-1).tolist()


def paired_interval(differences: np.ndarray, seed: int = 0) -> Interval:
    """Mean of paired differences and its 95 % percentile bootstrap interval."""
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = values[rng.integers(0, len(values), size=(BOOTSTRAP_DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def mean_psnr(values: list[float | None]) -> float | None:
    """Mean over samples; None if every sample is identical, which no number of decibels describes."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
