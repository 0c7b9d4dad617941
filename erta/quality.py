"""How near runs of a solver come to the uncached ones, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from erta.trajectories import Trajectories, decoded_values

NOTHING = 1e-12


@dataclass(frozen=True)
class Quality:
    """How far runs are from the uncached ones, by prompt.

    Attributes:
        latent_error: relative L2 error of the final latent, (P,).
        psnr_db: of what the pipeline decodes, (P,); None if the trajectories were recorded without decoding.
    """

    latent_error: np.ndarray
    psnr_db: np.ndarray | None

    def summary(self) -> dict[str, Any]:
        """Mean and median, for a report."""
        found: dict[str, Any] = {
            "latent_error": self.latent_error.tolist(),
            "median_latent_error": float(np.median(self.latent_error)),
        }
        if self.psnr_db is not None:
            found |= {
                "psnr_db": self.psnr_db.tolist(),
                "mean_psnr_db": float(self.psnr_db.mean()),
                "median_psnr_db": float(np.median(self.psnr_db)),
                "worst_psnr_db": float(self.psnr_db.min()),
            }
        return found

    @property
    def score(self) -> float:
        """Mean of decibels: higher is better."""
        values = self.psnr_db if self.psnr_db is not None else -20 * np.log10(np.maximum(self.latent_error, NOTHING))
        return float(values.mean())


def quality_of(recorded: Trajectories, end: np.ndarray, made: list[Any]) -> Quality:
    """Of runs whose latents end at `end`, (P, M) at the recorded positions, and what the pipeline's calls returned."""
    wanted = recorded.latents[:, -1]
    error = np.linalg.norm(end - wanted, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), NOTHING)
    if not recorded.decoded.shape[1]:
        return Quality(error, None)
    found = np.concatenate([decoded_values(one, decode=True) for one in made])
    mse = np.mean((found.astype(np.float64) - recorded.decoded) ** 2, axis=1)
    return Quality(error, -10 * np.log10(np.maximum(mse, 1e-10)))
