"""The grid of a pipeline's call."""

from __future__ import annotations

import numpy as np
import pytest

import erta
from experiments.models.call import call_grid
from tests.pipelines import CALL, FLUX_CALL, PROMPTS, build_flux, build_pipe


@pytest.mark.parametrize(("build", "call"), [(build_pipe, CALL), (build_flux, FLUX_CALL)])
def test_the_grid_is_the_one_of_the_call(build, call):
    """FLUX brings its own sigmas, shifted by image size. Mutants: the scheduler's default grid; a scheduler left over."""
    pipe = build()
    scheduler = pipe.scheduler
    sigmas = call_grid(pipe, call).sigmas
    assert pipe.scheduler is scheduler
    made_for = erta.calibrate(pipe, PROMPTS[:1], window=2, **call).signature["sigmas"]
    np.testing.assert_array_equal(sigmas, np.array(made_for, np.float32))
