"""How far a cached clip is from its uncached twin: PSNR, SSIM, MS-SSIM and LPIPS, by sample and by frame.

Measured on decoded tensors, or on clips that were saved as people save them (`bench.frames_from=mp4`), which puts
the codec's loss into every number: some later papers measure so. The two are never comparable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from analysis.intervals import mean_psnr

MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales of Wang et al. (2003), finest first
WINDOW = 11  # pixels, Gaussian, sigma 1.5
FRAMES_AT_ONCE = 16


def psnr_by_frame(clip: np.ndarray, reference: np.ndarray) -> list[float | None]:
    """PSNR of every frame in dB; None where a frame is identical."""
    return [psnr_db(frame, wanted) for frame, wanted in zip(clip, reference, strict=True)]


def ssim_by_frame(clip: np.ndarray, reference: np.ndarray) -> list[float]:
    """SSIM of every frame (Gaussian window 11x11, data range 1)."""
    return _by_frame(functools.partial(structural_similarity_index_measure, sigma=1.5), clip, reference)


def ms_ssim_betas(height: int, width: int) -> tuple[float, ...]:
    """Weights of the MS-SSIM scales, finest first, for frames of this size; empty if there is no second scale.

    The rule: of the five published scales the finest n whose coarsest is still as large as the 11x11 window,
    `min(height, width) >= 11 * max(2^(n-1), (n-1)^2)` (the second is torchmetrics' own bound, stricter for n = 4);
    their published weights, divided by their sum. Five from 176 pixels on, four from 99, three from 44, two from 22.
    """
    side = min(height, width)
    count = max(n for n in range(1, 6) if n == 1 or side >= WINDOW * max(2 ** (n - 1), (n - 1) ** 2))
    weights = MS_SSIM_BETAS[:count]
    return () if count == 1 else tuple(beta / sum(weights) for beta in weights) if count < 5 else weights


def ms_ssim_by_frame(clip: np.ndarray, reference: np.ndarray) -> list[float]:
    """MS-SSIM of every frame, with the scales of `ms_ssim_betas`, which must not be empty for this size."""
    measure = functools.partial(
        multiscale_structural_similarity_index_measure, betas=ms_ssim_betas(*clip.shape[1:3]), normalize="relu"
    )
    return _by_frame(measure, clip, reference)


def compare(clip: np.ndarray, reference: np.ndarray, lpips: Lpips) -> dict[str, Any]:
    """All metrics of one sample, floats (frames, height, width, 3) in [0, 1], and under `frames` those of every frame.

    `psnr_db` is the PSNR of the mean squared error over all frames, None if the clips are identical, and
    `psnr_frame_mean_db` the mean over frames that are not; the other metrics are means over frames. MS-SSIM is absent
    where frames are too small for it, LPIPS without its weights.
    """
    frames: dict[str, Any] = {"psnr_db": psnr_by_frame(clip, reference), "ssim": ssim_by_frame(clip, reference)}
    if ms_ssim_betas(*clip.shape[1:3]):
        frames["ms_ssim"] = ms_ssim_by_frame(clip, reference)
    if lpips.missing is None:
        frames["lpips"] = [value for a, b in _chunks(clip, reference) for value in lpips.by_frame(a, b)]
    means = {key: float(np.mean(values)) for key, values in frames.items() if key != "psnr_db"}
    return {
        "psnr_db": psnr_db(clip, reference),
        "psnr_frame_mean_db": mean_psnr(frames["psnr_db"]),
        **means,
        "frame_size": list(clip.shape[1:3]),
        "frames": frames,
    }


def summarise(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Means over the samples of `compare`, and what is missing with the reason. The MS-SSIM weights stand beside it."""
    values, size = [row["psnr_db"] for row in rows], rows[0]["frame_size"]
    metrics: dict[str, Any] = {
        "psnr_db": mean_psnr(values),
        "psnr_frame_mean_db": mean_psnr([row["psnr_frame_mean_db"] for row in rows]),
        "identical": all(value is None for value in values),
        "identical_prompts": values.count(None),  # have no PSNR and are left out of its mean
    }
    metrics |= {
        key: float(np.mean([row[key] for row in rows])) for key in ("ssim", "ms_ssim", "lpips") if key in rows[0]
    }
    missing: dict[str, str | None] = {}
    if "ms_ssim" in metrics:
        metrics["ms_ssim_betas"] = list(ms_ssim_betas(*size))
    else:
        missing["ms_ssim"] = (
            f"frames of {size[0]}x{size[1]} are too small: two scales of an {WINDOW}x{WINDOW} window need {2 * WINDOW}"
        )
    if "lpips" not in metrics:
        missing["lpips"] = Lpips().missing
    return metrics, missing


def _by_frame(measure: Callable[..., torch.Tensor], clip: np.ndarray, reference: np.ndarray) -> list[float]:
    """`measure` of torchmetrics on every frame, a few frames at a time: its maps take ten times a frame's memory."""
    values = []
    for a, b in _chunks(clip, reference):
        pair = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) for x in (a, b))
        values += measure(*pair, data_range=1.0, kernel_size=WINDOW, reduction="none").reshape(-1).tolist()
    return values


def _chunks(clip: np.ndarray, reference: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(clip), FRAMES_AT_ONCE):
        yield clip[start : start + FRAMES_AT_ONCE], reference[start : start + FRAMES_AT_ONCE]


ALEXNET_FILE = "alexnet-owt-7be5be79.pth"


def psnr_db(clip: np.ndarray, reference: np.ndarray) -> float | None:
    """PSNR of the mean squared error over all frames of a sample; None if the clips are identical."""
    mse = float(np.mean((clip.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return None if mse == 0 else float(-10 * np.log10(mse))


def ssim(clip: np.ndarray, reference: np.ndarray) -> float:
    """SSIM per frame (Gaussian window 11x11, data range 1), mean over frames."""
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2) for x in (clip, reference))
    return float(structural_similarity_index_measure(a, b, data_range=1.0, kernel_size=11, sigma=1.5))


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
