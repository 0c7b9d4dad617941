"""The time grid: the nominal sigmas, or the paper's trajectory-aware adjustment of them. Pure functions."""

from __future__ import annotations

import numpy as np

from erta.errors import ErtaError
from erta.policy import Mask, segments

PHI_MIN = 0.01  # phi = 0 makes two sigmas equal, and multistep solvers then divide by zero


def step_scale(error_over_denominator: np.ndarray) -> np.ndarray:
    """phi of every step, `clip(1 - ||v_cached - v||_1 / D, PHI_MIN, 1)`: ERTACache, Eq. 9, with D = ||v||_1.

    The paper clips at 0, see PHI_MIN; other sources have D = ||v[i] - v[i-1]||_1.
    """
    return np.clip(1.0 - error_over_denominator, PHI_MIN, 1.0)


def adjusted_sigmas(sigmas: np.ndarray, mask: Mask, phi: np.ndarray, takeover: int | None = None) -> np.ndarray:
    """The grid whose reused steps are shortened by phi and which still ends where it ended.

    ERTACache, "Trajectory-aware timestep adjustment".

    Args:
        sigmas: nominal grid (num_steps + 1,), strictly decreasing, float32.
        mask: computed steps.
        phi: step scale (num_steps,); only the values at reused steps are used.
        takeover: the step from which a second transformer runs. Each transformer's part of the grid is adjusted on
            its own and ends where it ended: the pipeline changes transformers by the time, so it still does at
            this step.

    After each step the rest is re-budgeted: a computed step takes its nominal length times
    (remaining sigma / remaining nominal sigma), a reused one phi times that, the last the remainder.
    With phi = 1 everywhere the nominal values come back bit for bit.
    """
    sigmas = np.asarray(sigmas, dtype=np.float32)
    check_grid(sigmas)
    if len(mask) != len(sigmas) - 1 or len(phi) != len(mask):
        raise ErtaError(f"a grid of {len(sigmas)} sigmas does not fit {len(mask)} steps and {len(phi)} values of phi")
    scale = np.where(np.asarray(mask), 1.0, np.asarray(phi, dtype=np.float64))
    if not (np.isfinite(scale).all() and (scale > 0).all() and (scale <= 1).all()):
        raise ErtaError("phi must lie in (0, 1] at every reused step")
    adjusted = sigmas.copy()
    for part in segments(len(mask), takeover):
        ends = slice(part.start, part.stop + 1)
        adjusted[ends] = _rebudgeted(sigmas[ends], scale[part.start : part.stop])
    check_grid(adjusted)
    return adjusted


def _rebudgeted(sigmas: np.ndarray, scale: np.ndarray) -> np.ndarray:
    if (scale == 1.0).all():
        return sigmas
    nominal = sigmas.astype(np.float64)
    end, result = nominal[-1], [nominal[0]]
    for step in range(len(scale) - 1):
        stretch = (result[-1] - end) / (nominal[step] - end)
        result.append(result[-1] + scale[step] * (nominal[step + 1] - nominal[step]) * stretch)
    return np.array([*result, end], dtype=np.float32)


def longer_last_step(sigmas: np.ndarray, adjusted: np.ndarray, takeover: int | None = None) -> np.ndarray:
    """The nominal grid, evenly shrunk so that its last step is as long as that of `adjusted`; both (num_steps + 1,).

    A control: what of the adjustment's effect comes from the longer last step alone, and not from phi. With a second
    transformer from step `takeover` on, each one's part has its own last step.
    """
    result = np.array(sigmas, dtype=np.float32)
    for part in segments(len(result) - 1, takeover):
        ends = slice(part.start, part.stop + 1)
        result[ends] = _shrunk(np.asarray(sigmas)[ends], np.asarray(adjusted)[ends])
    return result


def _shrunk(sigmas: np.ndarray, adjusted: np.ndarray) -> np.ndarray:
    nominal = np.asarray(sigmas, dtype=np.float64)
    if len(nominal) == 2:
        return nominal.astype(np.float32)
    shrink = (nominal[0] - float(adjusted[-2])) / (nominal[0] - nominal[-2])
    result = nominal[0] + shrink * (nominal - nominal[0])
    result[-1] = nominal[-1]
    return result.astype(np.float32)


def computed_sigmas(sigmas: np.ndarray, mask: Mask) -> np.ndarray:
    """The sigmas of the computed steps and the end: the grid of the same solver without a cache (`plan_grid`)."""
    return np.asarray(sigmas, dtype=np.float32)[[*np.flatnonzero(mask), -1]]


def check_grid(sigmas: np.ndarray) -> None:
    """Raise ErtaError unless the grid is finite and strictly decreasing in float32."""
    if len(sigmas) < 2 or not np.isfinite(sigmas).all() or not (np.diff(sigmas) < 0).all():
        raise ErtaError("the time grid must be finite and strictly decreasing in float32")
