"""Runs of all calibration prompts at once, in few steps: along coefficients that are being chosen, or of a solver that is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from erta.errors import NonFiniteError
from erta.fitted_scheduler import FittedScheduler
from erta.least_squares import MEMORY, as_tables, features_of, products_of
from erta.lockstep import Answer, Asked, run_in_step
from erta.quality import Quality, quality_of
from erta.solver import Solver
from erta.trajectories import Trajectories, batch_call

Choose = Callable[[int, np.ndarray], np.ndarray]
OnStep = Callable[[int, int], None]


class Runs:
    """Runs of a pipeline on the prompts and noises of its trajectories.

    Attributes:
        forwards: made so far, a guidance branch; K for each prompt and run.
    """

    def __init__(
        self,
        pipe: Any,
        recorded: Trajectories,
        pipeline_kwargs: dict[str, Any],
        batch_size: int = 1,
        on_step: OnStep | None = None,
    ) -> None:
        self.pipe, self.recorded, self.kwargs = pipe, recorded, pipeline_kwargs
        self.batch_size, self.on_step = batch_size, on_step
        self.forwards = 0

    def along(self, frame: Solver, choose: Choose) -> tuple[np.ndarray, Quality]:
        """With the coefficients that `choose` gives at each node of `frame`: those of the first prompt (K, F), and the error.

        `choose(k, products)` gives (P, F) from the products of target and terms, (P, F + 1, F + 1). Raises NonFiniteError.
        """
        recorded, nodes = self.recorded, (*frame.nodes, frame.num_nominal)
        past: dict[str, list[list[torch.Tensor]]] = {name: [] for name in frame.tables}  # of each call, newest first
        used: list[np.ndarray] = []

        def at_positions(values: list[torch.Tensor]) -> np.ndarray:
            return torch.cat([self._sampled(value) for value in values]).numpy()

        def step(k: int, asked: list[Asked]) -> list[torch.Tensor]:
            for name, kept in past.items():
                new = [_present(one, name) for one in asked]
                kept[:] = [[one, *before][:MEMORY] for one, before in zip(new, kept or [[]] * len(new), strict=True)]
            sampled = {
                name: [at_positions([call[lag] for call in kept]) for lag in range(min(MEMORY, k + 1))]
                for name, kept in past.items()
            }
            x = sampled["latent"]
            features = features_of(sampled["velocity"], x, sampled.get("contrast"))
            if not np.isfinite(features).all():
                bad = int(np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))[0])
                raise NonFiniteError(
                    f"prompt {recorded.record['prompts'][bad]!r}: the output at node {k} of {frame.num_steps} is not finite"
                )
            coefficients = choose(k, products_of(recorded.latents[:, nodes[k + 1]] - x[0], features))
            used.append(coefficients[0])
            return [
                _advance(coefficients[part], {name: kept[call] for name, kept in past.items()})
                for call, part in enumerate(self._parts)
            ]

        quality = self._run(FittedScheduler(frame, self.pipe.scheduler), step)
        return np.stack(used), quality

    def alone(self, scheduler: FittedScheduler) -> Quality:
        """Of a solver as it is."""
        copies = [copy.copy(scheduler) for _ in self._parts]  # each call has a history of its own

        def step(k: int, asked: list[Asked]) -> list[torch.Tensor]:
            return [own._next(k, one.output, one.latent) for own, one in zip(copies, asked, strict=True)]

        return self._run(scheduler, step)

    @property
    def _parts(self) -> list[slice]:
        """The prompts of each call."""
        return [slice(at, at + self.batch_size) for at in range(0, self.recorded.num_prompts, self.batch_size)]

    def _run(self, scheduler: FittedScheduler, step: Answer) -> Quality:
        """All prompts at the nodes of `scheduler`, with the next latents that `step` gives."""
        recorded, count = self.recorded, scheduler.solver.num_steps
        prompts, seeds, decode = recorded.record["prompts"], recorded.record["seeds"], bool(recorded.decoded.shape[1])
        calls = [
            {**batch_call(prompts[part], seeds[part], decode, self.kwargs), "num_inference_steps": count}
            for part in self._parts
        ]
        end: list[torch.Tensor] = []

        def answer(k: int, asked: list[Asked]) -> list[torch.Tensor]:
            latents = step(k, asked)
            if k == count - 1:
                end.extend(map(self._sampled, latents))
            if self.on_step is not None:
                self.on_step(k + 1, count)
            return latents

        made = run_in_step(self.pipe, scheduler, calls, answer)
        self.forwards += count * len(prompts)
        return quality_of(recorded, torch.cat(end).numpy(), made)

    def _sampled(self, value: torch.Tensor) -> torch.Tensor:
        flat = value.flatten(1)
        return flat[:, torch.from_numpy(self.recorded.positions).to(flat.device)].float().cpu()


def _present(asked: Asked, table: str) -> torch.Tensor:
    """What a solver's table has coefficients for."""
    value = {"velocity": asked.output, "latent": asked.latent, "contrast": asked.contrast}[table]
    assert value is not None
    return value


def _advance(coefficients: np.ndarray, past: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """The next latents of one call, (batch, …), with coefficients (batch, F), in float32, from what it had at its last nodes."""
    x = past["latent"][0].float()
    shape = (-1,) + (1,) * (x.ndim - 1)

    def spread(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(values)).to(x.device, torch.float32).reshape(shape)

    result = x
    for name, table in as_tables(coefficients).items():
        for lag, value in enumerate(past[name]):
            result = torch.addcmul(result, spread(table[:, lag]), value.float())
    return result
