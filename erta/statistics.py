"""Statistics of all step pairs of uncached trajectories, streamed: no trajectory is ever stored.

For a pair (c, i), `m = i - c` steps apart, on the same input x[i]: the cached output would be
`v_cached = x[i] + r[c]`, so its error is `err = v_cached - v[i] = r[c] - r[i]`. Index [i, m - 1] holds it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import torch

from erta.errors import ErtaError
from erta.hooks import channel_axis, like_output
from erta.rectifier import Moments

REL_L1_DENOMINATORS = ("ground_truth", "cached")
PHI_DENOMINATORS = ("velocity", "increment")


@dataclass(frozen=True)
class Spread:
    """Running count, mean and sum of squared deviations (Welford), arrays of one shape."""

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    def merge(self, other: Spread) -> Spread:
        """Spread of both samples together."""
        count = self.count + other.count
        safe, delta = np.maximum(count, 1.0), other.mean - self.mean
        return Spread(
            count=count,
            mean=self.mean + delta * other.count / safe,
            m2=self.m2 + other.m2 + delta * delta * self.count * other.count / safe,
        )

    def std(self) -> np.ndarray:
        """Sample standard deviation; NaN below two samples."""
        return np.sqrt(np.where(self.count > 1, self.m2, np.nan) / np.maximum(self.count - 1, 1))


@dataclass(frozen=True)
class PairStatistics:
    """What one or many prompts leave behind.

    Shapes, with N steps, window W, B guidance branches, C channels:
        rel_l1: (2, N, W) over `REL_L1_DENOMINATORS`; samples are prompts times branches.
        phi_ratio: (2, N, W) over `PHI_DENOMINATORS`, of the guided output; samples are prompts.
        moments: (B, N, W, C).
    """

    rel_l1: Spread
    phi_ratio: Spread
    moments: Moments

    def merge(self, other: PairStatistics) -> PairStatistics:
        """Statistics over both sets of prompts."""
        if self.moments.count.shape != other.moments.count.shape:
            raise ErtaError("these statistics have different steps, windows, branches or channels")
        return PairStatistics(
            self.rel_l1.merge(other.rel_l1), self.phi_ratio.merge(other.phi_ratio), self.moments.merge(other.moments)
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, `part.field`."""
        return {
            f"{part}.{item.name}": getattr(getattr(self, part), item.name)
            for part in ("rel_l1", "phi_ratio", "moments")
            for item in fields(getattr(self, part))
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> PairStatistics:
        """The inverse of `to_arrays`; raises KeyError if one is missing."""

        def part(name: str, kind: type) -> dict[str, np.ndarray]:
            return {item.name: arrays[f"{name}.{item.name}"] for item in fields(kind)}

        return cls(
            Spread(**part("rel_l1", Spread)), Spread(**part("phi_ratio", Spread)), Moments(**part("moments", Moments))
        )


class TrajectoryObserver:
    """Collects the pair statistics of one prompt from `observe(step, branch, x, velocity)` calls."""

    def __init__(self, window: int, guidance_scale: float | None) -> None:
        self.window, self.guidance_scale = window, guidance_scale
        self.branches: list[str] = []
        self.latent_shape: tuple[int, ...] | None = None
        self._residuals: dict[str, deque[torch.Tensor]] = {}
        self._pending: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._step = -1
        self._last_guided: torch.Tensor | None = None
        self._pairs: list[tuple[int, int, int, torch.Tensor, torch.Tensor]] = []  # branch, step, gap, ratios, sums
        self._phi: list[tuple[int, int, torch.Tensor]] = []
        self._finite: list[torch.Tensor] = []

    def observe(self, step: int, branch: str, x: torch.Tensor, velocity: torch.Tensor) -> None:
        """Take one transformer output. Steps come in order, each branch once a step."""
        if step != self._step:
            self._close_step()
            if step != self._step + 1:
                raise ErtaError(f"calibration saw step {step} after step {self._step}: steps must come in order")
            self._step = step
        if branch in self._pending:
            raise ErtaError(f"calibration saw branch {branch!r} twice at step {step}")
        if branch not in self.branches:
            self.branches.append(branch)
            self._residuals[branch] = deque(maxlen=self.window)
        self.latent_shape = tuple(x.shape[1:])
        self._pending[branch] = (like_output(x, velocity).float(), velocity.float())

    def finish(self, num_steps: int) -> PairStatistics:
        """Statistics of the trajectory that ended. Raises ErtaError if it is incomplete or not finite."""
        self._close_step()
        if self._step + 1 != num_steps:
            raise ErtaError(f"calibration saw {self._step + 1} of {num_steps} steps")
        finite = torch.stack(self._finite).cpu().numpy()
        if not finite.all():
            raise ErtaError(f"the transformer's output is not finite at step {int(np.flatnonzero(~finite)[0])}")
        return self._to_arrays(num_steps)

    def _close_step(self) -> None:
        if not self._pending:
            return
        residuals = {}
        for branch, (x, velocity) in self._pending.items():
            residuals[branch] = velocity - x
            self._finite.append(torch.isfinite(velocity).all())
            for gap, old in enumerate(reversed(self._residuals[branch]), start=1):
                self._add_pair(self.branches.index(branch), gap, x, old, residuals[branch])
        self._add_phi(residuals)
        for branch, residual in residuals.items():
            self._residuals[branch].append(residual)
        self._pending = {}

    def _add_pair(self, branch: int, gap: int, x: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> None:
        error = old - new
        change = error.abs().sum(dtype=torch.float64)
        sizes = torch.stack([new.abs().sum(dtype=torch.float64), old.abs().sum(dtype=torch.float64)])
        axis = channel_axis(x)
        v = (x + old).double().movedim(axis, 0).flatten(1)
        e = error.double().movedim(axis, 0).flatten(1)
        mean_v, mean_e = v.mean(1), e.mean(1)
        v, e = v - mean_v[:, None], e - mean_e[:, None]
        sums = torch.stack([mean_v, mean_e, (v * v).sum(1), (v * e).sum(1), (e * e).sum(1)])
        self._pairs.append((branch, self._step, gap, change / sizes, sums))

    def _add_phi(self, residuals: dict[str, torch.Tensor]) -> None:
        """Ratios of the guided output's cache error to `||v||` and to `||v - v_before||`, both L1."""
        x = next(iter(self._pending.values()))[0]
        guided = x + self._guide(residuals)
        for gap in range(1, 1 + min(len(old) for old in self._residuals.values())):
            error = self._guide({b: self._residuals[b][-gap] for b in residuals}) - self._guide(residuals)
            assert self._last_guided is not None  # there is a gap, so there was a step before
            sizes = torch.stack([guided.abs().sum(), (guided - self._last_guided).abs().sum()]).double()
            self._phi.append((self._step, gap, error.abs().sum(dtype=torch.float64) / sizes))
        self._last_guided = guided

    def _guide(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(values) == 1:
            return next(iter(values.values()))
        if set(values) != {"cond", "uncond"} or self.guidance_scale is None:
            raise ErtaError(f"calibration does not know how the guidance branches {sorted(values)} are combined")
        return values["uncond"] + self.guidance_scale * (values["cond"] - values["uncond"])

    def _to_arrays(self, num_steps: int) -> PairStatistics:
        branches, window = len(self.branches), self.window
        channels = self._pairs[0][4].shape[1] if self._pairs else 1
        latent = next(iter(self._residuals.values()))[-1]
        per_channel = float(latent.numel() // latent.shape[channel_axis(latent)])
        ratio = np.zeros((branches, 2, num_steps, window))
        sums = np.zeros((5, branches, num_steps, window, channels))
        seen = np.zeros((num_steps, window))
        if self._pairs:
            ratios = torch.stack([p[3] for p in self._pairs]).cpu().numpy()
            moments = torch.stack([p[4] for p in self._pairs]).cpu().numpy()
            for index, (branch, step, gap, _, _) in enumerate(self._pairs):
                ratio[branch, :, step, gap - 1], sums[:, branch, step, gap - 1] = ratios[index], moments[index]
                seen[step, gap - 1] = 1.0
        phi = np.zeros((2, num_steps, window))
        for step, gap, value in self._phi:
            phi[:, step, gap - 1] = value.cpu().numpy()
        count = np.broadcast_to(seen, (2, num_steps, window)).copy()
        rel_l1 = Spread(count * 0, count * 0, count * 0)
        for branch in range(branches):
            rel_l1 = rel_l1.merge(Spread(count, ratio[branch], count * 0))
        counts = np.broadcast_to(seen[None, :, :, None] * per_channel, sums.shape[1:]).copy()
        return PairStatistics(rel_l1, Spread(count, phi, count * 0), Moments(counts, *sums))
