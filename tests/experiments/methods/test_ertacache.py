"""ERTACache in the harness: options that a solver cannot serve are refused before anything is computed."""

from __future__ import annotations

import pytest
from diffusers import CogVideoXDDIMScheduler

from erta.errors import ErtaError
from experiments.harness.arm import make_arm
from experiments.harness.setup import Setup
from tests.commands import config
from tests.pipelines import build_cogvideox, build_flux


def test_a_corrector_that_is_not_there_cannot_be_switched_off():
    """Mutant: found out by the pipeline, so that a row of a table fails in place of being left out."""
    for cache in ("policy", "uniform"):
        setup = Setup(config("model=flux_tiny", f"cache={cache}", "cache.corrector_at_reused=false"), build_flux())
        with pytest.raises(ErtaError, match="FlowMatchEulerDiscreteScheduler has no corrector to switch off"):
            make_arm(setup)


def test_sigmas_that_are_not_there_cannot_be_moved():
    setup = Setup(config("model=cogvideox_2b", "cache=ertacache"), build_cogvideox(CogVideoXDDIMScheduler()))
    with pytest.raises(ErtaError, match=r"CogVideoXDDIMScheduler has no sigmas to move: add cache.adjust_time=false"):
        make_arm(setup)
