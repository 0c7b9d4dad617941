"""TODO DOC"""

from __future__ import annotations

import re


def wan_cost(costs, *parts: str) -> float:
    return sum(cost for name, cost in costs.items() if any(part in name for part in parts))


def of_layers(pipe, costs, pattern: str) -> float:
    """The share of all layers in modules of these names."""
    return sum(cost for name, cost in costs.items() if re.match(pattern, name))
