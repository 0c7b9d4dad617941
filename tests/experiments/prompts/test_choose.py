"""Which prompts a run uses."""

from __future__ import annotations

import pytest

from experiments.prompts.choose import calibration_prompts
from experiments.prompts.choose import test_prompts as prompts_of
from tests.commands import config


def test_vbench_calibration_prompts_come_last_in_its_tests():
    """Mutants: calibration on prompts that the first tests use; tests that change with the calibration's size."""
    pytest.importorskip("vbench")
    cfg = config("model=wan21", "bench.num_prompts=900")
    held_out = calibration_prompts(cfg)
    texts = [prompt.text for prompt in prompts_of(cfg)]
    assert len(held_out) == 20 and len(texts) == 900 and not {*held_out} & {*texts}
    more = config("model=wan21", "bench.num_prompts=900", "calibration.num_prompts=30")
    assert [prompt.text for prompt in prompts_of(more)] == texts and calibration_prompts(more)[:20] == held_out
