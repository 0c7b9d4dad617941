"""Statistics of all step pairs of uncached trajectories, streamed: no trajectory is ever stored.

For a pair (c, i), `m = i - c` steps apart, on the same input x[i]: the cached output would be `v_cached`, made
from the residual r[c], and its error `err = v_cached - v[i]`. At the output site `v_cached = x[i] + r[c]` and
`err = r[c] - r[i]`; at the blocks site r is the block stack's, and v_cached what the head makes of it.
Index [i, m - 1] holds the pair. Two steps that lie in different transformers of a pipeline make no pair.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from erta.architectures import Architecture
from erta.errors import ErtaError, NonFiniteError
from erta.guidance import branches_of, given_part, guide, known_pair, split, weighted, weights_of
from erta.rectifier import Moments
from erta.site import SeenForward

SAME_OUTPUT = 0.05  # relative; pipelines combine in the transformer's type


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
        rel_l1: (2, N, W) over `erta.options.REL_L1_DENOMINATORS`; samples are prompts times branches.
        phi_ratio: (2, N, W) over `erta.options.PHI_DENOMINATORS`, of the guided output; samples are prompts.
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


@dataclass(frozen=True)
class _Seen:
    """One forward of the current step: its velocity, and its velocities as predicted from each earlier residual."""

    x: torch.Tensor
    velocity: torch.Tensor
    residual: torch.Tensor
    predictions: list[Callable[[], torch.Tensor]]  # index gap - 1


class TrajectoryObserver:
    """Collects the pair statistics of one prompt from `observe` calls.

    Keeps the residuals of `window` steps and nothing else of the trajectory. At the `output` site predictions
    are made when they are needed; at `blocks` they need the forward at hand, so `eager` makes them at once.
    `takeover` is the first step that ran in a second transformer, under `guidance_scale_2`; None if none did. `combines_by` is
    the scale that the branches are combined by, where that is another than `guidance_scale` (true guidance).
    """

    def __init__(
        self,
        window: int,
        guidance_scale: float | None,
        architecture: Architecture,
        eager: bool = False,
        guidance_scale_2: float | None = None,
        combines_by: float | None = None,
    ) -> None:
        self.window, self.guidance_scale, self.eager = window, guidance_scale, eager
        self.architecture = architecture
        self.combines_by = (combines_by if combines_by is not None else guidance_scale, guidance_scale_2)  # by stage
        self.takeover: int | None = None
        self.branches: list[str] = []
        self.latent_shape: tuple[int, ...] | None = None
        self._residuals: dict[str, deque[torch.Tensor]] = {}
        self._pending: dict[str, _Seen] = {}
        self._step, self._stage = -1, 0
        self._last_guided: torch.Tensor | None = None
        self._model_output: tuple[torch.Tensor, torch.Tensor] | None = None  # and the sample
        self._per_channel, self._channels = 1.0, 1
        self._pairs: list[tuple[int, int, int, torch.Tensor, torch.Tensor]] = []  # branch, step, gap, ratios, sums
        self._phi: list[tuple[int, int, torch.Tensor]] = []
        self._finite: list[torch.Tensor] = []
        self._given: list[tuple[float, torch.Tensor | None]] = []  # see `given_to_solver`

    def observe(self, forward: SeenForward) -> None:
        """Take one forward. Steps come in order, each cache context once a step.

        Raises ErtaError for other orders, and where the first transformer runs after the second.
        """
        step, context, velocity = forward.step, forward.branch, forward.velocity
        if step != self._step:
            self._close_step()
            if step != self._step + 1:
                raise ErtaError(
                    f"the pipeline went from step {max(self._step, 0)} to step {step}: it runs its steps in several passes (chunks of "
                    "a long video), or begins in the middle without telling its scheduler. That cannot be planned"
                )
            self._step = step
            if forward.stage > self._stage:  # the first transformer's residuals are never paired with the second's
                self._stage, self.takeover = forward.stage, step
                self._residuals = {name: deque(maxlen=self.window) for name in self._residuals}
        if forward.stage != self._stage:
            raise ErtaError(f"calibration saw both transformers at step {step}, or the first after the second")
        if context in self._pending:
            raise ErtaError(
                f"the pipeline runs branch {context!r} twice at step {step}: its frames have schedules of their own, or its steps "
                "are not the scheduler's. That cannot be planned"
            )
        if context not in self._residuals:
            self._check_branches(switched=self._step > 0)
            self.branches += branches_of(context, self.guidance_scale)
            self._residuals[context] = deque(maxlen=self.window)
        self.latent_shape = tuple(forward.x.shape[1:])
        predictions: list[Callable[[], torch.Tensor]] = []
        for earlier in reversed(self._residuals[context]):
            make = partial(forward.predict, earlier)
            predictions.append(partial(_identity, make()) if self.eager else make)
        self._pending[context] = _Seen(forward.x, velocity, forward.residual, predictions)

    def stepped(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        """Take what the solver was given at the step whose forwards were observed: how the branches were combined."""
        if self._pending:
            self._model_output = model_output.detach(), sample.detach()

    def _combination(self, velocities: dict[str, torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
        """How this step's branches are combined: by the scale, or, where that is not known, as was seen to be done."""
        scale = self.combines_by[self._stage]
        if len(velocities) == 1 or (known_pair(velocities) and scale is not None):
            return partial(guide, guidance_scale=scale)
        weights = None if self._model_output is None else weights_of(velocities, *self._model_output)
        if weights is None:
            raise ErtaError(
                f"it cannot be seen how this pipeline combines its guidance branches {sorted(velocities)}. Calibrate with guidance "
                "off"
            )
        return partial(weighted, weights=weights)

    def _check_branches(self, switched: bool) -> None:
        if switched:
            raise ErtaError(
                f"guidance was switched on or off at step {self._step}: a plan has the same branches at every step"
            )

    def finish(self, num_steps: int) -> PairStatistics:
        """Statistics of the trajectory that ended. Raises ErtaError if it is incomplete or not finite."""
        self._close_step()
        if self._step + 1 != num_steps:
            raise ErtaError(
                f"the pipeline ran {self._step + 1} of the {num_steps} steps of its grid: it was interrupted, or runs a part of "
                "them (a strength below 1) and does not tell its scheduler which. That cannot be planned"
            )
        finite = torch.stack(self._finite).cpu().numpy()
        if not finite.all():
            raise NonFiniteError(f"the transformer's output is not finite at step {int(np.flatnonzero(~finite)[0])}")
        return self._to_arrays(num_steps)

    def _close_step(self) -> None:
        if not self._pending:
            return
        self._check_branches(switched=self._pending.keys() != self._residuals.keys())
        velocities: dict[str, torch.Tensor] = {}
        for context, seen in self._pending.items():
            velocities |= self._split(context, seen, seen.velocity)
        self._finite.append(torch.stack([torch.isfinite(value).all() for value in velocities.values()]).all())
        combine = self._combination(velocities)
        guided = combine(velocities)
        self._note_given(guided, combine({branch: torch.ones(()) for branch in velocities}))
        axis = self.architecture.channel_axis_of(guided)
        self._channels = guided.shape[axis]
        self._per_channel = guided.numel() / self._channels
        for gap in range(1, 1 + min(len(old) for old in self._residuals.values())):
            predicted: dict[str, torch.Tensor] = {}
            for context, seen in self._pending.items():
                parts = self._split(context, seen, seen.predictions[gap - 1]())
                old = self._split(context, seen, self._residuals[context][-gap])
                new = self._split(context, seen, seen.residual)
                for branch, v_cached in parts.items():
                    change = _l1(old[branch] - new[branch]) / torch.stack([_l1(new[branch]), _l1(old[branch])])
                    sums = channel_moments(v_cached, v_cached - velocities[branch], axis)
                    self._pairs.append((self.branches.index(branch), self._step, gap, change, sums))
                predicted |= parts
            self._add_phi(gap, guided, combine(predicted))
        self._last_guided = guided
        for context, seen in self._pending.items():
            self._residuals[context].append(seen.residual)
        self._pending, self._model_output = {}, None

    def _note_given(self, guided: torch.Tensor, of_ones: torch.Tensor) -> None:
        sizes, guided = None, guided.flatten()
        if self._model_output is not None and self._model_output[0].numel() == guided.numel():
            made = self._model_output[0].float().flatten()
            sizes = torch.stack([(made - guided).norm(), (made + guided).norm(), made.norm()])
        self._given.append((float(of_ones), sizes))

    @property
    def given_to_solver(self) -> str:
        """What the pipeline gives its solver at every step: the guided `velocity`, the same `negated`, or something `else`."""
        found = set()
        for weight, sizes in self._given:
            plus, minus, size = (1.0, 1.0, 1.0) if sizes is None else sizes.tolist()
            sign = weight if plus < SAME_OUTPUT * size else -weight if minus < SAME_OUTPUT * size else 0.0
            found.add(
                "velocity" if abs(sign - 1) < SAME_OUTPUT else "negated" if abs(sign + 1) < SAME_OUTPUT else "else"
            )
        return found.pop() if len(found) == 1 else "else"

    def _add_phi(self, gap: int, guided: torch.Tensor, predicted: torch.Tensor) -> None:
        """Ratios of the guided output's cache error to `||v||` and to `||v - v_before||`, both L1."""
        assert self._last_guided is not None  # there is a gap, so there was a step before
        sizes = torch.stack([_l1(guided), _l1(guided - self._last_guided)])
        self._phi.append((self._step, gap, _l1(predicted - guided) / sizes))

    def _split(self, context: str, seen: _Seen, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a value of the output's form (a residual of tokens: the whole) holds for the solver, by branch, float32."""
        if self._model_output is not None and value.shape == seen.velocity.shape:
            given = given_part(seen.x, seen.velocity, self._model_output[1])
            value = value if given is None else given.of(value)
        return split(value.float(), branches_of(context, self.guidance_scale))

    def _to_arrays(self, num_steps: int) -> PairStatistics:
        branches, window, channels = len(self.branches), self.window, self._channels
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
        counts = np.broadcast_to(seen[None, :, :, None] * self._per_channel, sums.shape[1:]).copy()
        return PairStatistics(rel_l1, Spread(count, phi, count * 0), Moments(counts, *sums))


def _identity(value: torch.Tensor) -> torch.Tensor:
    return value


def _l1(value: torch.Tensor) -> torch.Tensor:
    return value.abs().sum(dtype=torch.float64)


def channel_moments(v_cached: torch.Tensor, error: torch.Tensor, axis: int) -> torch.Tensor:
    """Means and centred sums of squares and products by channel, float64 (5, channels), as `Moments` orders them."""
    v = v_cached.double().movedim(axis, 0).flatten(1)
    e = error.double().movedim(axis, 0).flatten(1)
    mean_v, mean_e = v.mean(1), e.mean(1)
    v, e = v - mean_v[:, None], e - mean_e[:, None]
    return torch.stack([mean_v, mean_e, (v * v).sum(1), (v * e).sum(1), (e * e).sum(1)])
