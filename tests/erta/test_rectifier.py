"""The closed form against numpy. Mutants caught: uncentred moments, the printed 4K in the offset, a wrong merge."""

import numpy as np

from erta.rectifier import Moments, fit_linear


def moments_of(v: np.ndarray, e: np.ndarray) -> Moments:
    """Per row (channel) by definition."""
    dv, de = v - v.mean(1, keepdims=True), e - e.mean(1, keepdims=True)
    count = np.full(len(v), float(v.shape[1]))
    return Moments(count, v.mean(1), e.mean(1), (dv**2).sum(1), (dv * de).sum(1), (de**2).sum(1))


def test_recovers_an_exactly_linear_error():
    rng = np.random.default_rng(0)
    v = rng.normal(2.0, 1.5, (3, 1000))
    slope, offset = np.array([0.3, -0.2, 0.0]), np.array([0.1, 0.0, -0.7])
    e = slope[:, None] * v + offset[:, None]
    fit = fit_linear(moments_of(v, e))
    rectified = fit.gain[:, None] * v + fit.offset[:, None]
    np.testing.assert_allclose(rectified, v - e, atol=1e-12)
    np.testing.assert_allclose(fit.r2[:2], 1.0, atol=1e-9)


def test_agrees_with_numpy_polyfit():
    rng = np.random.default_rng(1)
    v = rng.normal(1.0, 2.0, (1, 500))
    e = 0.4 * v + rng.normal(0, 0.3, v.shape)
    fit, (slope, intercept) = fit_linear(moments_of(v, e)), np.polyfit(v[0], e[0], 1)
    np.testing.assert_allclose(1 - fit.gain[0], slope, rtol=1e-10)
    np.testing.assert_allclose(-fit.offset[0], intercept, rtol=1e-9)
    np.testing.assert_allclose(fit.r2[0], np.corrcoef(v[0], e[0])[0, 1] ** 2, rtol=1e-9)


def test_merge_equals_one_pass():
    rng = np.random.default_rng(2)
    v, e = rng.normal(5, 1, (4, 900)), rng.normal(-3, 2, (4, 900))
    whole = moments_of(v, e)
    merged = moments_of(v[:, :100], e[:, :100]).merge(moments_of(v[:, 100:], e[:, 100:]))
    for name in ("count", "mean_v", "mean_e", "s_vv", "s_ve", "s_ee"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12, err_msg=name)


def test_channel_without_variance_gets_the_mean_error():
    fit = fit_linear(moments_of(np.full((1, 10), 2.0), np.full((1, 10), 0.5)))
    assert fit.gain[0] == 1.0 and fit.offset[0] == -0.5
