"""A static cache is a solver: its nodes and its coefficients.

All that a static plan does at the transformer's output (reuse, a moved grid, rectification, extrapolation) and all that a
flow-matching solver does is linear in what a run has: the latents x and the guided outputs v at its computed steps, the nodes.
So a whole cached run is a linear multistep rule on K nodes,

    x[k+1] = x[k] + sum_j velocity[k, j] v[k-j] + sum_j latent[k, j] x[k-j] + offset[k],

with coefficients that are numbers, or one a channel where a rectifier is. `linear_solver` finds them: the pipeline's own
scheduler is run, step by step, not on latents but on their coefficients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from erta.errors import ErtaError
from erta.grid import check_grid
from erta.policy import Mask
from erta.scheduler import has_sigmas, nominal_sigmas

EXACT = 2e-6  # relative residual of a step written in fewer terms: float32 arithmetic of the schedulers leaves 1e-7
LARGE = 1e3  # coefficients beyond it would lose digits in float32: a longer memory is taken


@dataclass(frozen=True)
class Solver:
    """A linear multistep solver on the K nodes of a grid of N steps.

    Attributes:
        nodes: steps of the nominal grid at which the transformer is run, ascending; the first is 0.
        sigmas: noise levels at the nodes and at the end, float32 (K + 1,).
        timesteps: what the transformer is told at the nodes, (K,).
        nominal_sigmas: the grid that the nodes are steps of, float32 (N + 1,).
        velocity, latent: coefficients of v[k - j] and x[k - j] in `x[k+1] - x[k]`, (K, H, C): H is the length of the memory, C
            the number of channels, or 1. Zero where k - j < 0.
        offset: (K, C).
        contrast: coefficients of c[k - j] - u[k - j], the difference of the two guidance branches, (K, H, C); None for a solver
            that sees the guided output alone. See `erta.branches`.
        report: how it came about, for the record.
    """

    nodes: tuple[int, ...]
    sigmas: np.ndarray
    timesteps: np.ndarray
    nominal_sigmas: np.ndarray
    velocity: np.ndarray
    latent: np.ndarray
    offset: np.ndarray
    report: dict[str, Any] = field(default_factory=dict)
    contrast: np.ndarray | None = None

    def __post_init__(self) -> None:
        steps = len(self.nodes)
        if not steps or self.nodes[0] != 0 or any(b <= a for a, b in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ErtaError(f"the nodes of a solver ascend from step 0, unlike {list(self.nodes)}")
        if self.nodes[-1] >= self.num_nominal:
            raise ErtaError(f"there is no node {self.nodes[-1]} on a grid of {self.num_nominal} steps")
        shapes = {"sigmas": (steps + 1,), "timesteps": (steps,), "latent": self.velocity.shape}
        shapes |= {"offset": (steps, self.velocity.shape[-1])}
        if self.contrast is not None:
            shapes["contrast"] = self.velocity.shape
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ErtaError(f"{name} of a solver of {steps} steps is {getattr(self, name).shape}, not {shape}")
        if self.velocity.ndim != 3 or len(self.velocity) != steps:
            raise ErtaError(f"the coefficients of a solver of {steps} steps are {self.velocity.shape}, not (K, H, C)")
        for name in (*self.tables, "offset", "timesteps"):
            if not np.isfinite(getattr(self, name)).all():
                raise ErtaError(f"{name} of a solver holds NaN or infinity")
        for name, table in self.tables.items():
            if any(table[k, k + 1 :].any() for k in range(min(steps, table.shape[1] - 1))):
                raise ErtaError(f"{name} of a solver reaches before its first step")
        check_grid(np.asarray(self.sigmas, np.float32))
        check_grid(np.asarray(self.nominal_sigmas, np.float32))

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """The coefficients of what a run has at its nodes, by name, (K, H, C) each."""
        found = {"velocity": self.velocity, "latent": self.latent}
        return found if self.contrast is None else {**found, "contrast": self.contrast}

    @property
    def num_steps(self) -> int:
        """K: forwards a guidance branch."""
        return len(self.nodes)

    @property
    def num_nominal(self) -> int:
        """N: steps of the grid that it stands for."""
        return len(self.nominal_sigmas) - 1

    @property
    def memory(self) -> int:
        """H: of how many nodes latents and outputs are used, the present one included."""
        return self.velocity.shape[1]

    @property
    def kept(self) -> int:
        """How many latents are kept between two steps: those and the outputs of earlier nodes that are used."""
        return sum(int(table[:, j].any()) for table in self.tables.values() for j in range(1, self.memory))

    def reach(self, step: int) -> int:
        """How many nodes back the rule of one step looks: 0 if it needs the present node alone."""
        used = np.any([table[step].any(axis=1) for table in self.tables.values()], axis=0)
        return int(np.flatnonzero(used).max(initial=0))

    def advance(
        self, step: int, latents: Sequence[Any], velocities: Sequence[Any], contrasts: Sequence[Any] = ()
    ) -> Any:
        """x[k+1] from what the nodes k, k - 1, … had, newest first. Channels, if any, are the last axis.

        Raises ErtaError where contrasts are needed and not given.
        """
        if self.contrast is not None and not contrasts:
            raise ErtaError("this solver tells the guidance branches apart: give their contrasts too")
        result = latents[0] + self._as(self.offset[step], latents[0])
        values_of = {"velocity": velocities, "latent": latents, "contrast": contrasts}
        for name, table in self.tables.items():
            for coefficients, value in zip(table[step], values_of[name], strict=False):
                if coefficients.any():
                    result = result + self._as(coefficients, value) * value
        return result

    @staticmethod
    def _as(coefficients: np.ndarray, value: Any) -> Any:
        if len(coefficients) == 1:
            return float(coefficients[0])
        return torch.as_tensor(coefficients, dtype=value.dtype) if torch.is_tensor(value) else coefficients


@dataclass(frozen=True)
class Computed:
    """A computed step: its number, and latent and guided output there."""

    step: int
    x: torch.Tensor
    v: torch.Tensor


# the guided output that a reused step gives the scheduler: from the step, its latent, the computed steps so far
Predict = Callable[[int, torch.Tensor, list[Computed]], torch.Tensor]


def reuse_residual(step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
    """`x + r` with the last computed step's residual (ERTACache)."""
    return x + (computed[-1].v - computed[-1].x)


def reuse_velocity(step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
    """The last computed step's output again."""
    return computed[-1].v


def linear_solver(
    scheduler: Any,
    mask: Mask,
    nominal: np.ndarray | None = None,
    predict: Predict = reuse_residual,
    channels: int = 1,
    report: dict[str, Any] | None = None,
) -> Solver:
    """What a scheduler makes of a run in which only the steps of `mask` are computed, as one solver.

    Args:
        scheduler: diffusers' flow-match Euler, UniPC or DPM-Solver++, or any whose step is linear, after `set_timesteps`. It is
            left alone.
        mask: which of its steps are computed.
        nominal: the grid that its steps stand for, (num_steps + 1,); None: its own.
        predict: what takes the place of the output at the other steps: linear, by channel if `channels` > 1. It is given
            tensors whose last axis are the channels.
        channels: how many channels its coefficients tell apart.

    Raises ErtaError for a scheduler without sigmas, and for one whose step is not linear or draws noise.
    """
    if not mask or not mask[0]:
        raise ErtaError("a solver must compute its first step: there is nothing to reuse before it")
    if not has_sigmas(scheduler):
        raise ErtaError(f"{type(scheduler).__name__} does not integrate over sigmas: it is no solver of this kind")
    if len(scheduler.timesteps) != len(mask):
        raise ErtaError(f"a mask of {len(mask)} steps does not fit a grid of {len(scheduler.timesteps)}")
    run, count = _Run(scheduler, mask, predict), sum(mask)
    basis = torch.eye(count + 2, dtype=torch.float64)[:, :, None].expand(-1, -1, channels)  # x[0], v[0] … v[K-1], 1
    vectors = [basis[place : place + 1] for place in range(count + 2)]
    latents = run(vectors[0], vectors[1:-1], vectors[-1])
    velocity, latent, offset = _shortest(torch.cat(latents).numpy())
    nodes = tuple(int(step) for step in np.flatnonzero(mask))
    grid = nominal_sigmas(scheduler)
    solver = Solver(
        nodes=nodes,
        sigmas=grid[[*nodes, -1]],
        timesteps=np.asarray(torch.as_tensor(scheduler.timesteps).cpu())[list(nodes)],
        nominal_sigmas=grid if nominal is None else np.asarray(nominal, np.float32),
        velocity=velocity,
        latent=latent,
        offset=offset,
        report=report or {},
    )
    _check_is_linear(solver, run, channels)
    return solver


class _Run:
    """A run of a scheduler with given outputs at the computed steps and predicted ones between them."""

    def __init__(self, scheduler: Any, mask: Mask, predict: Predict) -> None:
        self.scheduler, self.mask, self.predict = scheduler, mask, predict

    def __call__(self, noise: torch.Tensor, outputs: Sequence[torch.Tensor], one: torch.Tensor) -> list[torch.Tensor]:
        """The latent at every computed step, and the last."""
        scheduler, x = copy.deepcopy(self.scheduler), noise
        computed: list[Computed] = []
        for step, timestep in enumerate(scheduler.timesteps):
            if self.mask[step]:
                v = outputs[len(computed)]
                computed.append(Computed(step, x, v))
            else:
                v = self.predict(step, x, computed)
                if isinstance(self.predict, WithOffset):
                    v = v + self.predict.offset(step) * one
            x = scheduler.step(v, timestep, x, return_dict=False)[0].to(noise.dtype)
        return [*(seen.x for seen in computed), x]


class WithOffset:
    """A prediction with a constant in it: `gain * (what another predicts) + offset`, both (num_steps, channels)."""

    def __init__(self, predict: Predict, gain: np.ndarray, offsets: np.ndarray) -> None:
        self.predict, self.gain, self.offsets = predict, torch.as_tensor(gain), torch.as_tensor(offsets)

    def __call__(self, step: int, x: torch.Tensor, computed: list[Computed]) -> torch.Tensor:
        return self.gain[step] * self.predict(step, x, computed)

    def offset(self, step: int) -> torch.Tensor:
        """(channels,): what is added to the prediction."""
        return self.offsets[step]


def _shortest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every step in as few terms as reproduce it: (K, H, C) twice, and offsets (K, C).

    `rows` (K + 1, K + 2, C) hold the nodes' latents and the last, each in terms of x[0], the outputs, and 1.
    """
    count, channels = len(rows) - 1, rows.shape[2]
    terms = np.zeros((2, count, count, channels))
    offset = np.zeros((count, channels))
    for k in range(count):
        for c in range(channels):
            velocity, latent, offset[k, c] = _fewest_terms(rows[..., c], k)
            terms[0, k, : len(velocity), c], terms[1, k, : len(latent), c] = velocity, latent
    memory = 1 + int(np.flatnonzero(terms.any(axis=(0, 1, 3))).max(initial=0))
    velocity, latent = terms[:, :, :memory]
    return velocity, latent, offset


def _fewest_terms(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`x[k+1] - x[k]` of one channel by the shortest memory that gives it, without terms that it does not need."""
    unit, wanted = np.eye(rows.shape[1]), rows[k + 1] - rows[k]
    size, constant = np.abs(rows[: k + 2]).max(), float(wanted[-1])

    def solved(features: np.ndarray) -> np.ndarray | None:
        if not len(features):
            return None
        solution = np.linalg.lstsq(features[:, :-1].T, wanted[:-1], rcond=1e-6)[0]
        if np.abs(solution @ features[:, :-1] - wanted[:-1]).max() > EXACT * size:
            return None
        return solution if np.abs(solution).max(initial=0) <= LARGE * max(1.0, np.abs(wanted).max()) else None

    for memory in range(1, k + 2):
        features = np.vstack([unit[[1 + k - j for j in range(memory)]], rows[[k - j for j in range(memory)]]])
        if solved(features) is None:
            continue
        used = list(range(2 * memory))
        for place in reversed(range(2 * memory)):  # latents of long ago first
            fewer = [other for other in used if other != place]
            if solved(features[fewer]) is not None:
                used = fewer
        terms = np.zeros(2 * memory)
        terms[used] = solved(features[used])
        return terms[:memory], terms[memory:], constant - float(terms @ features[:, -1])
    latent = np.zeros(k + 1)  # the whole history, which always does: x[0] and every output
    latent[k] = wanted[0]
    return wanted[1 : k + 2][::-1], latent, constant


def _check_is_linear(solver: Solver, run: _Run, channels: int) -> None:
    """Raise ErtaError unless the solver does to random vectors what the scheduler does to them."""
    generator = torch.Generator().manual_seed(0)
    noise, *outputs = torch.randn((solver.num_steps + 1, 1, 64, channels), generator=generator, dtype=torch.float64)
    wanted = run(noise, outputs, torch.ones_like(noise))
    found = noise
    for k in range(solver.num_steps):
        reach = range(k, max(-1, k - solver.memory), -1)
        found = solver.advance(k, [wanted[j] for j in reach], [outputs[j] for j in reach])
        error = float((found - wanted[k + 1]).abs().max() / wanted[k + 1].abs().max())
        if not error < 1e-4:
            raise ErtaError(
                f"{type(run.scheduler).__name__} is not linear in latents and outputs as it is configured here (thresholding? "
                "noise of its own?): it is no linear multistep solver"
            )
