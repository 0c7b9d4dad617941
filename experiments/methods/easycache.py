"""EasyCache (Zhou et al., 2025, arXiv 2507.02860): how much the output will change, from how the input changed.

Site: the output's residual, ERTACache's own. Stored: that residual in each guidance branch; of the branch that decides
also the last step's input and the last computed step's input and output. Decided online. At computed steps the rule
measures `k = mean|Δv| / mean|Δx|` between this and the last computed step. Between them it adds up `k · mean|x_t -
x_{t-1}| / mean|v|`, with v the last computed output, and reuses the residual while the sum stays below `tau`. The
branch that the pipeline runs first decides for all branches. Where we differ: nothing that we know of.
"""

from __future__ import annotations

import torch

from erta.online import Call, OnlineRule, mean_change
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number, online_arm

KNOB = Knob("tau", 1e-4, 1e2)


def arm(setup: Setup) -> Arm:
    """EasyCache at `cache.options.tau`, or at the tau that meets the budget."""
    return online_arm(setup, KNOB, EasyCache)


class EasyCache(OnlineRule):
    """See the module.

    Args:
        tau: the accumulated relative change at which the transformer is run; published: 0.05, 0.1, 0.2.
        warmup: so many first steps are computed (published: 10 of 50); the last step always is.
    """

    def __init__(self, tau: float, warmup: int = 10) -> None:
        self.tau = check_number("tau", tau, 0)
        self.warmup = check_number("warmup", warmup, 1, whole=True)
        self.begin(0)

    def begin(self, num_steps: int) -> None:
        self.accumulated = 0.0
        self.rate: float | None = None  # k
        self.x_before: torch.Tensor | None = None  # of the last step, computed or not
        self.at_computed: tuple[torch.Tensor, torch.Tensor] | None = None  # x and v
        self.decided: tuple[int, str, bool] | None = None  # step, deciding branch, decision

    def should_compute(self, call: Call) -> bool:
        if self.decided is None or self.decided[0] != call.step:
            self.decided = (call.step, call.branch, self._decide(call))
        return self.decided[2]

    def _decide(self, call: Call) -> bool:
        x_before, self.x_before = self.x_before, call.x
        if call.step < self.warmup or call.is_last or self.rate is None or x_before is None:
            return True
        assert self.at_computed is not None
        size = self.at_computed[1].float().abs().mean().item()
        self.accumulated += self.rate * mean_change(call.x, x_before) / size
        return self.accumulated >= self.tau

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        if self.decided is None:  # the first step is computed without asking
            self.decided, self.x_before = (call.step, call.branch, True), call.x
        if call.branch != self.decided[1]:
            return
        self.accumulated = 0.0
        if self.at_computed is not None:
            x, v = self.at_computed
            change = mean_change(call.x, x)
            self.rate = mean_change(velocity, v) / change if change > 0 else None
        self.at_computed = (call.x, velocity)
