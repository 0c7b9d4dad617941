"""MagCache (Ma et al., 2025, arXiv 2506.09045): reuse while the residual's size has changed little.

Site: the block stack's residual, in token space. Stored: the last one in each guidance branch. Static, since the
decisions follow from measured ratios alone, but different in each branch: gamma_t is the mean ratio of the residual's norm
at step t to that at t - 1; after the first steps the rule keeps `R = Π gamma`, `E = Σ|1 - R|` and the number k of steps
since the last computed one, and reuses while `E <= delta` and `k <= max_skip`. Where we differ: by default the ratios are
the mean over 5 calibration prompts, not one prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from erta.architectures import architecture_of
from erta.errors import ErtaError, choice_index
from erta.online import Call, OnlineRule
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number, online_arm
from experiments.methods.common.published import CHOICES, published
from experiments.methods.common.recorders import Recorder, record

KNOB = Knob("delta", 1e-6, 1e3)
PROMPTS = 5


def arm(setup: Setup) -> Arm:
    """MagCache at `cache.options.delta`, or at the delta that meets the budget.

    Its ratios are measured on calibration prompts, or with `cache.options.constants=published` the authors': refused
    for another model, number of steps or site.
    """
    ratios = ratios_of(setup)
    made = online_arm(setup, KNOB, lambda constants, **options: MagCache(ratios=ratios, **options))
    made.report["ratios"] = ratios
    return made


class MagCache(OnlineRule):
    """See the module.

    Args:
        delta: bound on the accumulated error E.
        max_skip: the longest run of reused steps.
        retention: this share of the steps, from the first on, is computed.
        ratios: gamma by cache context, one a step (that of step 0 is not used).
    """

    def __init__(self, delta: float, max_skip: int, retention: float, ratios: Mapping[str, Sequence[float]]) -> None:
        self.delta = check_number("delta", delta, 0)
        self.max_skip = check_number("max_skip", max_skip, 1, whole=True)
        self.retention = check_number("retention", retention, 0)
        self.ratios = ratios
        self.num_steps = 0
        self.state: dict[str, tuple[float, float, int]] = {}

    def begin(self, num_steps: int) -> None:
        for branch, ratios in self.ratios.items():
            if len(ratios) != num_steps:
                raise ErtaError(f"the ratios of branch {branch!r} are for {len(ratios)} steps, not {num_steps}")
        self.num_steps, self.state = num_steps, {}

    def should_compute(self, call: Call) -> bool:
        if call.branch not in self.ratios:
            raise ErtaError(f"there are no ratios for the branch {call.branch!r}, only for {', '.join(self.ratios)}")
        if call.step < int(self.retention * self.num_steps + 0.5):
            return True
        ratio, error, skipped = self.state.get(call.branch, (1.0, 0.0, 0))
        ratio *= self.ratios[call.branch][call.step]
        error, skipped = error + abs(1 - ratio), skipped + 1
        self.state[call.branch] = (ratio, error, skipped)
        return error > self.delta or skipped > self.max_skip

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        self.state.pop(call.branch, None)


class RatioRecorder(Recorder):
    """gamma of every step by branch: mean over positions of the ratio of the residual's norms over channels."""

    def begin(self, num_steps: int) -> None:
        self.ratios: dict[str, list[float]] = {}
        self.before: dict[str, torch.Tensor] = {}

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        norm = residual.float().norm(dim=architecture_of(call.transformer).channel_axis_of(residual))
        before = self.before.get(call.branch)
        self.ratios.setdefault(call.branch, []).append(1.0 if before is None else (norm / before).mean().item())
        self.before[call.branch] = norm


def ratios_of(setup: Setup) -> dict[str, list[float]]:
    """gamma by cache context, measured or published."""
    if choice_index("cache.options.constants", setup.options["constants"], CHOICES):
        if setup.cfg.cache.site != "blocks":
            raise ErtaError("MagCache's published ratios are of the block stack's residual: use cache.site=blocks")
        return published("magcache", setup.pipe, setup.cfg.model.num_inference_steps)["ratios"]

    def measure() -> dict[str, Any]:
        seen = [recorder.ratios for recorder in record(setup, RatioRecorder, PROMPTS)]
        return {"ratios": {branch: np.mean([one[branch] for one in seen], axis=0).tolist() for branch in seen[0]}}

    return kept(setup, "magcache", [PROMPTS], measure)["ratios"]
