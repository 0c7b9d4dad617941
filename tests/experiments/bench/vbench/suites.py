"""A small suite, and the package's own."""

from __future__ import annotations

from pathlib import Path

from experiments.bench.vbench import runner, suite

LONG = "a long prompt, " + "très " * 60 + "long"  # 380 bytes: no file can be named after it
ENTRIES = [
    {"prompt_en": "a red circle", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a blue star", "dimension": ["color"], "auxiliary_info": {"color": {"color": "blue"}}},
    {"prompt_en": LONG, "dimension": ["temporal_flickering", "scene"]},
    {"prompt_en": "a blue star", "dimension": ["temporal_flickering"]},
]


def package_info() -> Path:
    return runner.find_info(None)


def suite_of(dimensions, limit=None, videos=5) -> suite.Suite:
    from omegaconf import OmegaConf

    bench = {"dimensions": dimensions, "num_prompts": limit, "videos_per_prompt": videos}
    return suite.load_suite(OmegaConf.create({"bench": bench}), package_info())
