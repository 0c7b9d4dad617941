"""Shares of a forward, for tests of counted caches."""

from __future__ import annotations

import re

from erta.architectures import architecture_of
from erta.pipeline import find_denoiser, find_denoisers
from experiments.models.costs import forward_costs, outside_blocks


def wan_cost(costs, *parts: str) -> float:
    """The share of all layers whose names hold one of these parts."""
    return sum(cost for name, cost in costs.items() if any(part in name for part in parts))


def of_layers(pipe, costs, pattern: str) -> float:
    """The share of all layers in modules of these names."""
    return sum(cost for name, cost in costs.items() if re.match(pattern, name))


def reuse_share(pipe, call, stage: int = 0) -> float:
    """What part of a forward a step reused at the blocks runs."""
    transformer = find_denoisers(pipe).get(stage, find_denoiser(pipe))
    return outside_blocks(architecture_of(transformer).blocks, forward_costs(pipe, call, transformer))
