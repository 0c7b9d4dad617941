"""Time grids. Mutants caught: no re-budgeting (the end is missed), phi applied to computed steps."""

import numpy as np
import pytest

from erta.errors import ErtaError
from erta.grid import PHI_MIN, adjusted_sigmas, computed_sigmas, longer_last_step, step_scale

LINEAR = np.array([1.0, 0.75, 0.5, 0.25, 0.0], dtype=np.float32)


def test_phi_one_gives_the_original_bits():
    grid = (np.linspace(1, 0, 51) ** 0.7).astype(np.float32)
    mask = tuple(k % 3 == 0 for k in range(50))
    assert adjusted_sigmas(grid, mask, np.ones(50)).tobytes() == grid.tobytes()


def test_by_hand():
    # step 1 is reused with phi 0.5: 0.75 - 0.5 * 0.25 = 0.625. Left: 0.625 against 0.5 nominal, a stretch of 1.25,
    # so step 2 takes 1.25 * 0.25 = 0.3125 and the last the remainder.
    grid = adjusted_sigmas(LINEAR, (True, False, True, True), np.array([1, 0.5, 1, 1]))
    np.testing.assert_allclose(grid, [1.0, 0.75, 0.625, 0.3125, 0.0], atol=1e-7)


def test_longer_last_step_alone():
    """Mutants: the last step as it was, the shrinking around zero instead of around the start."""
    adjusted = adjusted_sigmas(LINEAR, (True, False, True, True), np.array([1, 0.5, 1, 1]))
    control = longer_last_step(LINEAR, adjusted)
    np.testing.assert_allclose(control, [1.0, 1 - 0.25 * 11 / 12, 1 - 0.5 * 11 / 12, 0.3125, 0.0], atol=1e-7)
    assert longer_last_step(LINEAR, LINEAR).tobytes() == LINEAR.tobytes()


def test_phi_counts_at_reused_steps_only():
    grid = adjusted_sigmas(LINEAR, (True, True, True, True), np.full(4, 0.3))
    assert grid.tobytes() == LINEAR.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_always_decreasing_and_ends_where_it_ended(seed):
    rng = np.random.default_rng(seed)
    base = np.linspace(1, 0, 31)
    nominal = (8 * base / (1 + 7 * base)).astype(np.float32)
    mask = (True, *(rng.random(29) < 0.4))
    grid = adjusted_sigmas(nominal, mask, rng.uniform(PHI_MIN, 1, 30))
    assert (np.diff(grid) < 0).all() and grid[0] == nominal[0] and grid[-1] == nominal[-1]


def test_step_scale_is_clipped_from_below():
    np.testing.assert_allclose(step_scale(np.array([0.0, 0.25, 3.0])), [1.0, 0.75, PHI_MIN])


def test_computed_sigmas():
    np.testing.assert_array_equal(computed_sigmas(LINEAR, (True, False, True, False)), [1.0, 0.5, 0.0])


def test_bad_grids():
    with pytest.raises(ErtaError, match="decreasing"):
        adjusted_sigmas(np.array([1.0, 0.5, 0.5, 0.0]), (True, False, True), np.ones(3))
    with pytest.raises(ErtaError, match="phi"):
        adjusted_sigmas(LINEAR, (True, False, True, True), np.array([1, 0.0, 1, 1]))
    with pytest.raises(ErtaError, match="does not fit"):
        adjusted_sigmas(LINEAR, (True, False), np.ones(2))
