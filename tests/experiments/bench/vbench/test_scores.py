"""VBench's scores, by hand."""

from __future__ import annotations

import pytest

from experiments.bench.vbench import dimensions, scores

# ---- scores

MADE_UP = {  # raw score → normalised by hand
    "subject_consistency": 0.31696,  # (0.31696 - 0.1462) / 0.8538 = 0.2
    "background_consistency": 0.5569,  # (0.5569 - 0.2615) / 0.7385 = 0.4
    "temporal_flickering": 0.85172,  # (0.85172 - 0.6293) / 0.3707 = 0.6
    "motion_smoothness": 0.9392,  # (0.9392 - 0.706) / 0.2915 = 0.8
    "dynamic_degree": 0.4,  # weight 0.5: 0.2
    "aesthetic_quality": 0.55,
    "imaging_quality": 0.65,
    "object_class": 0.9,
    "multiple_objects": 0.5,
    "human_action": 0.8,
    "color": 0.7,
    "spatial_relationship": 0.6,
    "scene": 0.4111,  # / 0.8222 = 0.5
    "appearance_style": 0.07205,  # (0.07205 - 0.0009) / 0.2846 = 0.25
    "temporal_style": 0.091,  # / 0.364 = 0.25
    "overall_consistency": 0.273,  # / 0.364 = 0.75
}


def test_scores_by_hand():
    found, missing = scores.aggregate(MADE_UP)
    # quality: (0.2 + 0.4 + 0.6 + 0.8 + 0.2 + 0.55 + 0.65) / 6.5 = 3.4 / 6.5
    assert found["vbench_quality"] == pytest.approx(0.5230769231, abs=1e-9)
    # semantic: (0.9 + 0.5 + 0.8 + 0.7 + 0.6 + 0.5 + 0.25 + 0.25 + 0.75) / 9 = 5.25 / 9
    assert found["vbench_semantic"] == pytest.approx(0.5833333333, abs=1e-9)
    # total: (4 * 0.5230769231 + 0.5833333333) / 5 = 2.6756410256 / 5
    assert found["vbench_total"] == pytest.approx(0.5351282051, abs=1e-9)
    assert missing == {} and set(MADE_UP) == set(dimensions.DIMENSIONS)


def test_no_total_while_a_dimension_is_missing():
    part = {name: value for name, value in MADE_UP.items() if name not in ("scene", "color")}
    found, missing = scores.aggregate(part)
    assert list(found) == ["vbench_quality"]
    assert missing["vbench_total"].endswith("color, scene") and missing["vbench_semantic"].endswith("color, scene")
    assert "vbench_quality" in scores.aggregate({"color": 1.0})[1]
