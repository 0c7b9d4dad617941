"""What a rule decides along made-up inputs."""

from __future__ import annotations

import torch

from erta.online import Call, OnlineRule


def decisions(rule: OnlineRule, xs, velocity, branches=("cond",)) -> dict[str, list[bool]]:
    """What a rule decides along made-up inputs (num_steps) of one value each; `velocity(step, branch)` is the output."""
    rule.begin(len(xs))
    made: dict[str, list[bool]] = {branch: [] for branch in branches}
    for step, value in enumerate(xs):
        for branch in branches:
            call = Call(step, len(xs), branch, torch.full((1, 1, 4), float(value)), torch.nn.Identity())
            compute = not made[branch] or rule.should_compute(call)
            made[branch].append(compute)
            if compute:
                v = torch.full_like(call.x, float(velocity(step, branch)))
                rule.computed(call, v, v - call.x)
    return made
