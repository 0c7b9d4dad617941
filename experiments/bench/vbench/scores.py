"""VBench's quality, semantic and total score, and the paired difference of two arms.

The bounds and weights are those of VBench's published score script (`scripts/cal_final_score.py` and
`scripts/constant.py` of its repository, Huang et al., arXiv 2311.17982); the package does not hold them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.intervals import paired_interval


@dataclass(frozen=True)
class Bounds:
    """A raw score is carried to (raw - low) / (high - low), unclipped, and weighted in the mean of its group."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Bounds(0.1462, 1.0),
    "background_consistency": Bounds(0.2615, 1.0),
    "temporal_flickering": Bounds(0.6293, 1.0),
    "motion_smoothness": Bounds(0.706, 0.9975),
    "dynamic_degree": Bounds(weight=0.5),
    "aesthetic_quality": Bounds(),
    "imaging_quality": Bounds(),
}
SEMANTIC = {
    "object_class": Bounds(),
    "multiple_objects": Bounds(),
    "human_action": Bounds(),
    "color": Bounds(),
    "spatial_relationship": Bounds(),
    "scene": Bounds(0.0, 0.8222),
    "appearance_style": Bounds(0.0009, 0.2855),
    "temporal_style": Bounds(0.0, 0.364),
    "overall_consistency": Bounds(0.0, 0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
GROUPS = {"vbench_quality": QUALITY, "vbench_semantic": SEMANTIC, "vbench_total": {**QUALITY, **SEMANTIC}}


def group_score(raw: dict[str, float], group: dict[str, Bounds]) -> float:
    """Weighted mean of the normalised scores of a group; every dimension of it must be in `raw`."""
    weighted = [b.weight * (raw[name] - b.low) / (b.high - b.low) for name, b in group.items()]
    return sum(weighted) / sum(bounds.weight for bounds in group.values())


def total_score(raw: dict[str, float]) -> float:
    """(4 · quality + semantic) / 5."""
    both = QUALITY_WEIGHT * group_score(raw, QUALITY) + SEMANTIC_WEIGHT * group_score(raw, SEMANTIC)
    return both / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def aggregate(raw: dict[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Quality, semantic and total score as far as their dimensions are there, and for the others what is missing."""
    scores, missing = {}, {}
    for key, group in GROUPS.items():
        absent = [name for name in group if name not in raw]
        if absent:
            missing[key] = f"not all of its dimensions were evaluated: {', '.join(absent)}"
        else:
            scores[key] = total_score(raw) if key == "vbench_total" else group_score(raw, group)
    return scores, missing


def paired_difference(cached: dict[str, float], uncached: dict[str, float]) -> dict[str, Any] | None:
    """Mean of cached minus uncached over the videos scored in both arms, with its 95 % interval and their number.

    None if no video was scored in both. Only `color` leaves videos out, those in which the object was not found.
    """
    both = sorted(cached.keys() & uncached.keys())
    if not both:
        return None
    interval = paired_interval(np.array([cached[name] - uncached[name] for name in both]))
    return {**asdict(interval), "videos": len(both)}
