"""Metrics against independent implementations and hand-computed values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from experiments import vbench_runner as vbench
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


def test_lossless_clips_come_back_exactly(tmp_path):
    import cv2

    frames = clip(3)
    path = tmp_path / "a.mp4"
    vbench.write_lossless(frames, path)
    capture, read = cv2.VideoCapture(str(path)), []
    while (pair := capture.read())[0]:
        read.append(pair[1][..., ::-1])
    np.testing.assert_array_equal(np.stack(read), vbench.to_uint8(frames))


def test_temporal_flickering_through_the_worker_equals_its_formula(tmp_path):
    """VBench's own code in its own process, against 1 - mean |frame difference| computed here."""
    clips = {f"{k:03d}.mp4": clip(k) for k in range(2)}
    for name, frames in clips.items():
        vbench.write_lossless(frames, tmp_path / name)
    answer = vbench.evaluate(tmp_path, {name: f"prompt {name}" for name in clips}, ["temporal_flickering"])
    for name, frames in clips.items():
        wanted = 1 - np.abs(np.diff(vbench.to_uint8(frames).astype(float), axis=0)).mean() / 255
        assert answer["temporal_flickering"]["per_video"][name] == pytest.approx(wanted, abs=1e-6)


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    ready, missing = vbench.split_dimensions(["temporal_flickering", "subject_consistency"], None)
    assert ready == ["temporal_flickering"]
    assert str(Path(tmp_path, "dino_model")) in missing["subject_consistency"]
    (tmp_path / "dino_model" / "facebookresearch_dino_main").mkdir(parents=True)
    (tmp_path / "dino_model" / "dino_vitbase16_pretrain.pth").touch()
    assert vbench.split_dimensions(["subject_consistency"], None) == (["subject_consistency"], {})
    with pytest.raises(ValueError, match="unknown"):
        vbench.split_dimensions(["beauty"], None)


def test_worker_failure_is_one_line(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        return subprocess.CompletedProcess(args, 1, "", "Traceback\nModuleNotFoundError: No module named 'vbench'\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(ValueError, match="No module named 'vbench'"):
        vbench.evaluate(tmp_path, {}, ["temporal_flickering"])
