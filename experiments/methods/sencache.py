"""SenCache (Haghighi and Alahi, 2026, arXiv 2602.24208): from sensitivities to x and t, how much the output has changed.

Site: the output's residual. Stored in each guidance branch: that residual and the input of the last computed step.
Decided online, for each branch: reuse while `J_x |x - x_c| + J_t |t - t_c|` stays below `epsilon`, with c the last
computed step, and at most `max_skip` steps in a row. In the first fifth of the steps epsilon is `first`.

J_x and J_t come from a table by step and branch, made by finite differences along uncached runs on calibration prompts.
Where we differ: |x| is the root mean square, so that epsilon does not depend on the size of the latent, t is in units
of the training schedule (0 … 1), the direction in x is a random one, 4 prompts are used in place of 8 clips, and the
last step is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from erta.errors import ErtaError
from erta.online import Call, OnlineRule
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number, online_arm
from experiments.methods.common.recorders import Recorder, record

PROMPTS = 4
STEP_X, STEP_T = 0.05, 5.0  # of the finite differences: root mean square, and training timesteps
TRAIN_STEPS = 1000
EARLY = 0.2
Table = Mapping[str, Sequence[tuple[float, float]]]


def arm(setup: Setup) -> Arm:
    """SenCache at `cache.options.epsilon`, or at the epsilon that meets the budget."""

    def measure() -> dict[str, Any]:
        tables = [recorder.table for recorder in record(setup, SensitivityRecorder, PROMPTS)]
        return {branch: np.mean([table[branch] for table in tables], axis=0).tolist() for branch in tables[0]}

    table = kept(setup, "sencache", [PROMPTS, STEP_X, STEP_T], measure)
    made = online_arm(setup, Knob("epsilon", 1e-5, 1e3), lambda **options: SenCache(table=table, **options))
    made.report["sensitivity"] = table
    return made


class SenCache(OnlineRule):
    """See the module.

    Args:
        epsilon: published: Wan 0.1 (slow), 0.2 (fast), of its own norm.
        max_skip: reused steps in a row; published: 2 (slow), 3 (fast).
        first: epsilon in the first fifth of the steps; published: 0.01. None: no other than later.
        table: (J_x, J_t) of every step, by branch.
    """

    def __init__(self, epsilon: float, max_skip: int, first: float | None, table: Table) -> None:
        self.epsilon = check_number("epsilon", epsilon, 0)
        self.first = self.epsilon if first is None else check_number("first", first, 0)
        self.max_skip = check_number("max_skip", max_skip, 1, whole=True)
        self.table = table
        self.begin(0)

    def begin(self, num_steps: int) -> None:
        for branch, rows in self.table.items():
            if num_steps and len(rows) != num_steps:
                raise ErtaError(f"the sensitivities of branch {branch!r} are for {len(rows)} steps, not {num_steps}")
        self.at_computed: dict[str, tuple[int, torch.Tensor, float]] = {}  # step, x, t

    def should_compute(self, call: Call) -> bool:
        if call.is_last:
            return True
        source, x, time = self.at_computed[call.branch]
        of_x, of_t = self.table[call.branch][source]
        score = of_x * rms(call.x.float() - x.float()) + of_t * abs(time_of(call) - time)
        epsilon = self.first if call.step < EARLY * call.num_steps else self.epsilon
        return score >= epsilon or call.step - source > self.max_skip

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        self.at_computed[call.branch] = (call.step, call.x, time_of(call))


class SensitivityRecorder(Recorder):
    """J_x and J_t of every step by branch, by finite differences: two more forwards a step."""

    def begin(self, num_steps: int) -> None:
        self.table: dict[str, list[tuple[float, float]]] = {}

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        direction = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(call.step)).to(call.x)
        moved = STEP_X * direction / rms(direction)
        assert call.kwargs is not None
        times = call.kwargs["timestep"]
        unit = 1.0 if times.float().max() > 1 else 1 / TRAIN_STEPS  # FLUX is given t / 1000
        later = (times.float() - STEP_T * unit).clamp(min=0)
        of_x = rms(_run(call, hidden_states=call.x + moved) - velocity) / STEP_X
        change = (times.float() - later).max().item() / (unit * TRAIN_STEPS)
        of_t = rms(_run(call, timestep=later.to(torch.float32)) - velocity) / change if change > 0 else 0.0
        self.table.setdefault(call.branch, []).append((of_x, of_t))


def _run(call: Call, **changes: Any) -> torch.Tensor:
    assert call.forward is not None
    with torch.no_grad():
        return call.forward(*call.args, **{**(call.kwargs or {}), **changes})[0]


def rms(value: torch.Tensor) -> float:
    """Root mean square, in float32."""
    return value.float().pow(2).mean().sqrt().item()


def time_of(call: Call) -> float:
    """The timestep of a call, in units of the training schedule, 0 … 1."""
    assert call.kwargs is not None
    time = call.kwargs["timestep"].float().max().item()
    return time / TRAIN_STEPS if time > 1 else time
