"""Metrics against independent implementations and hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from experiments.metrics import Lpips, mean_psnr, paired_interval, psnr_db, ssim
from experiments.scenes import render, sample_scene


def clip(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render(sample_scene(rng), rng)


def test_psnr_by_hand():
    reference = np.zeros((2, 16, 16, 3), np.float32)
    assert psnr_db(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-5)
    assert psnr_db(reference, reference) is None
    one_frame = reference.copy()
    one_frame[0] = 0.1  # MSE over all frames, not the mean of the frames' PSNR
    assert psnr_db(one_frame, reference) == pytest.approx(10 * np.log10(200), abs=1e-4)
    # 32 grey levels apart overflows in uint8; floats do not
    assert psnr_db(reference + 32 / 255, reference) == pytest.approx(-20 * np.log10(32 / 255), abs=1e-4)
    assert mean_psnr([20.0, None, 30.0]) == 25.0 and mean_psnr([None]) is None


def test_ssim_agrees_with_skimage():
    reference = clip()
    noisy = np.clip(reference + np.random.default_rng(1).normal(0, 0.05, reference.shape), 0, 1).astype(np.float32)
    settings = dict(data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    # torchmetrics averages over the whole map with its mirrored borders, skimage's plain score leaves them out
    maps = [structural_similarity(a, b, full=True, **settings)[1] for a, b in zip(noisy, reference, strict=True)]
    wanted = np.mean(maps)
    assert ssim(noisy, reference) == pytest.approx(wanted, abs=2e-3)
    assert ssim(reference, reference) == pytest.approx(1.0, abs=1e-6)


def test_paired_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    interval = paired_interval(rng.normal(0.5, 1.0, 200))
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.15)
    assert paired_interval(np.full(5, 2.0)).low == 2.0


def test_lpips_says_what_it_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert str(tmp_path) in (Lpips().missing or "")
