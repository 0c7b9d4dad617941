"""TeaCache (Liu et al., 2025, arXiv 2411.19108): the output's change, read off the modulated input's by a polynomial.

Site: the block stack's residual, in token space. Stored in each guidance branch: that residual and the last step's
signal. Decided online, for each branch: the rule adds up `p(mean|m_t - m_{t-1}| / mean|m_{t-1}|)`, with m the input of the
first block after its modulation by the timestep, and reuses while the sum stays below `delta`. The first and the last
step are computed. Where we differ: by default p is fitted on 5 calibration prompts of the model at hand, of a lower degree
than 4 where few steps do not determine that; on Wan and CogVideoX m is the time embedding (as the authors' own code has
it, on Wan without ret_steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from erta.architectures import architecture_of, knowing
from erta.errors import InstallError, choice_index
from erta.online import Call, OnlineRule, relative_change
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number, online_arm
from experiments.methods.common.published import CHOICES, published
from experiments.methods.common.recorders import Recorder, record

KNOB = Knob("delta", 1e-4, 1e3)
DEGREE = 4
FIT_PROMPTS = 5


def arm(setup: Setup) -> Arm:
    """TeaCache at `cache.options.delta`, or at the delta that meets the budget.

    Its polynomial is fitted on calibration prompts, or with `cache.options.constants=published` the authors' own,
    which is refused for a model or number of steps that they did not publish one for.
    """
    coefficients = coefficients_of(setup)
    made = online_arm(setup, KNOB, lambda delta, constants: TeaCache(delta, coefficients))
    made.report["coefficients"] = coefficients
    return made


def modulated_input(call: Call) -> torch.Tensor:
    """The signal of a call of the transformer, computed from its arguments and without its blocks.

    Raises InstallError for a transformer whose signal is not known.
    """
    known = architecture_of(call.transformer)
    if known.signal is None:
        raise InstallError(
            f"cache=teacache has no signal for {known.name} (it knows those of {knowing('signal')}): add one to its entry in "
            "erta/architectures.py"
        )
    with torch.no_grad():
        return known.signal(call.transformer, call.kwargs or {})


class TeaCache(OnlineRule):
    """See the module.

    Args:
        delta: the accumulated estimate at which the transformer is run.
        coefficients: of the polynomial, highest power first.
        signal: what is compared from step to step; the model's modulated input by default.
    """

    def __init__(
        self, delta: float, coefficients: Sequence[float], signal: Callable[[Call], torch.Tensor] = modulated_input
    ) -> None:
        self.delta = check_number("delta", delta, 0)
        self.coefficients, self.signal = np.asarray(coefficients, float), signal
        self.begin(0)

    def begin(self, num_steps: int) -> None:
        self.accumulated: dict[str, float] = {}
        self.before: dict[str, torch.Tensor] = {}

    def should_compute(self, call: Call) -> bool:
        now = self.signal(call)
        change = relative_change(now, self.before[call.branch])
        self.before[call.branch] = now
        self.accumulated[call.branch] += float(np.polyval(self.coefficients, change))
        return call.is_last or self.accumulated[call.branch] >= self.delta

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        if call.branch not in self.before:  # the first step is computed without asking
            self.before[call.branch] = self.signal(call)
        self.accumulated[call.branch] = 0.0


class ChangeRecorder(Recorder):
    """Relative changes of signal and output from one step to the next, over all branches."""

    def begin(self, num_steps: int) -> None:
        self.changes: list[tuple[float, float]] = []
        self.before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        signal = modulated_input(call)
        if call.branch in self.before:
            earlier_signal, earlier_velocity = self.before[call.branch]
            self.changes.append((relative_change(signal, earlier_signal), relative_change(velocity, earlier_velocity)))
        self.before[call.branch] = (signal, velocity)


def fit(changes: Sequence[tuple[float, float]]) -> list[float]:
    """Least-squares polynomial from the signal's change to the output's, highest power first.

    Of degree 4, or lower where there are not enough different signals to determine it (few steps).
    """
    signal, output = np.asarray(changes, float).T
    degree = min(DEGREE, len(np.unique(signal.round(9))) - 1)
    ascending = np.polynomial.Polynomial.fit(signal, output, degree).convert().coef
    return [float(value) for value in np.pad(ascending, (0, degree + 1 - len(ascending)))[::-1]]


def coefficients_of(setup: Setup) -> list[float]:
    """Of the polynomial, highest power first: fitted on calibration prompts, or the published ones."""
    chosen = setup.options["constants"]
    if choice_index("cache.options.constants", chosen, CHOICES):
        return published("teacache", setup.pipe, setup.cfg.model.num_inference_steps)["coefficients"]

    def measure() -> dict[str, Any]:
        recorders = record(setup, ChangeRecorder, FIT_PROMPTS)
        return {"coefficients": fit([change for recorder in recorders for change in recorder.changes])}

    return kept(setup, "teacache", [DEGREE, FIT_PROMPTS], measure)["coefficients"]
