"""Fidelity metrics by sample and by frame, and clips as they come back from an mp4."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from analysis import plots
from analysis.intervals import mean_psnr
from analysis.runs import load_runs
from erta.errors import ErtaError
from experiments.bench import fidelity
from experiments.bench.fidelity import Lpips, psnr_db, ssim
from experiments.output import clips
from experiments.output.files import read_lines
from experiments.scenes import render, sample_scene


def scene_clip(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render(sample_scene(rng), rng)


def noisy(reference: np.ndarray, std: float = 0.05) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, std, reference.shape)
    return np.clip(reference + noise, 0, 1).astype(np.float32)


def without_lpips() -> Lpips:
    lpips = Lpips()
    lpips.missing = "not wanted"
    return lpips


def test_psnr_by_frame_and_of_the_sample_by_hand():
    """20 dB, 40 dB and an identical frame. Mutants: the sample's PSNR as the mean of its frames', identical frames
    counted as zero decibels in that mean."""
    reference = np.zeros((3, 64, 64, 3), np.float32)
    changed = reference.copy()
    changed[0], changed[1] = 0.1, 0.01
    found = fidelity.compare(changed, reference, without_lpips())
    assert found["frames"]["psnr_db"] == [pytest.approx(20), pytest.approx(40), None]
    assert found["psnr_db"] == pytest.approx(-10 * np.log10((0.01 + 0.0001) / 3), abs=1e-4)
    assert found["psnr_frame_mean_db"] == pytest.approx(30)
    assert found["ssim"] == pytest.approx(np.mean(found["frames"]["ssim"])) and len(found["frames"]["ssim"]) == 3
    assert found["frames"]["ssim"][2] == pytest.approx(1) and found["frames"]["ssim"][0] < 0.5
    same = fidelity.compare(reference, reference, without_lpips())
    assert same["psnr_db"] is None and same["psnr_frame_mean_db"] is None and same["ms_ssim"] == pytest.approx(1)


def test_ms_ssim_scales_by_frame_size():
    """Mutants: the bound one pixel off, weights that do not add up to one, the coarsest scales kept instead."""
    sizes = {21: 0, 22: 2, 43: 2, 44: 3, 64: 3, 98: 3, 99: 4, 175: 4, 176: 5, 480: 5}
    for side, count in sizes.items():
        betas = fidelity.ms_ssim_betas(side, 1000)
        assert len(betas) == count and fidelity.ms_ssim_betas(1000, side) == betas
        assert count == 0 or sum(betas) == pytest.approx(1, abs=1e-3)
    assert fidelity.ms_ssim_betas(64, 64) == pytest.approx((0.0448 / 0.6305, 0.2856 / 0.6305, 0.3001 / 0.6305))
    assert fidelity.ms_ssim_betas(480, 832) == (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for side in (22, 44, 99, 176):  # torchmetrics takes every size from which a scale is added
        frames = np.random.default_rng(0).random((1, side, side, 3), np.float32)
        assert fidelity.ms_ssim_by_frame(frames, frames) == [pytest.approx(1, abs=1e-5)]


def test_ms_ssim_of_constant_frames_by_hand():
    """Without contrast only the luminance term of the coarsest scale is left, to the power of its weight.

    Mutants: weights not divided by their sum, another number of scales.
    """
    a, b = np.full((2, 64, 64, 3), 0.5, np.float32), np.full((2, 64, 64, 3), 0.6, np.float32)
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert fidelity.ms_ssim_by_frame(a, b) == [pytest.approx(luminance ** (0.3001 / 0.6305), abs=2e-4)] * 2


def test_ms_ssim_agrees_with_an_independent_one():
    """Every scale by scipy's Gaussian, colours apart; torchmetrics leaves borders out of the contrast, and keeps them,
    mirrored, in the full term. Mutants: contrast taken at the coarsest scale, no pooling."""

    def maps(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        def blur(values: np.ndarray) -> np.ndarray:
            return gaussian_filter(values, 1.5, truncate=3.5, mode="mirror", axes=(0, 1))

        mx, my = blur(x), blur(y)
        contrast = (2 * (blur(x * y) - mx * my) + 9e-4) / (blur(x * x) - mx**2 + blur(y * y) - my**2 + 9e-4)
        return float(contrast[5:-5, 5:-5].mean()), float(
            (contrast * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)).mean()
        )

    reference = scene_clip(2)
    changed = noisy(reference, 0.1)
    wanted = []
    for x, y in zip(changed.astype(float), reference.astype(float), strict=True):
        product, betas = 1.0, fidelity.ms_ssim_betas(64, 64)
        for scale, beta in enumerate(betas):
            contrast, full = maps(x, y)
            product *= (full if scale == len(betas) - 1 else contrast) ** beta
            x, y = (v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2, 3).mean((1, 3)) for v in (x, y))
        wanted.append(product)
    np.testing.assert_allclose(fidelity.ms_ssim_by_frame(changed, reference), wanted, atol=5e-4)
    assert max(wanted) < 0.97


def test_lpips_by_frame_in_chunks():
    """A stand-in network, mean |difference| in [-1, 1]. Mutants: frames not scaled, the last chunk left out."""
    lpips = Lpips()
    lpips.missing, lpips._net = None, lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True)
    reference = np.zeros((fidelity.FRAMES_AT_ONCE + 3, 32, 32, 3), np.float32)
    steps = np.arange(len(reference), dtype=np.float32) / 100
    found = fidelity.compare(reference + steps[:, None, None, None], reference, lpips)
    assert found["frames"]["lpips"] == pytest.approx((2 * steps).tolist(), abs=1e-6)
    assert found["lpips"] == pytest.approx(2 * steps.mean()) and lpips(reference[:1] + 0.25, reference[:1]) == 0.5


def test_what_is_too_small_or_absent_is_missing_with_its_reason():
    """Mutants: a metric of zero instead of none, weights recorded that were not used."""
    rng = np.random.default_rng(0)
    small = rng.random((2, 16, 16, 3), np.float32)
    row = fidelity.compare(small, small[::-1], without_lpips())
    assert "ms_ssim" not in row and "lpips" not in row
    metrics, missing = fidelity.summarise([row, row])
    assert "16x16 are too small" in missing["ms_ssim"] and "ms_ssim_betas" not in metrics and "lpips" in missing
    large = rng.random((2, 64, 64, 3), np.float32)
    rows = [fidelity.compare(other, large, without_lpips()) for other in (large, large[::-1])]
    metrics, missing = fidelity.summarise(rows)
    assert "ms_ssim" not in missing and metrics["ms_ssim_betas"] == list(fidelity.ms_ssim_betas(64, 64))
    assert metrics["psnr_db"] == rows[1]["psnr_db"] and metrics["identical_prompts"] == 1 and not metrics["identical"]
    assert metrics["ms_ssim"] == pytest.approx((1 + rows[1]["ms_ssim"]) / 2)


def test_mp4_frames_by_hand(tmp_path):
    """Mutants: the file's range of 16 to 235 taken for grey levels, a lossless file, colour at full resolution."""
    grey = np.full((5, 32, 32, 3), 0.9, np.float32)  # 213 of 16 … 235 in the file
    read = clips.through_mp4(grey, tmp_path / "new" / "grey.mp4")
    assert read.shape == grey.shape and read.dtype == np.float32
    np.testing.assert_allclose(read, 0.9, atol=2.5 / 255)
    np.testing.assert_array_equal(read * 255, np.round(read * 255))
    stripes = np.zeros((5, 32, 32, 3), np.float32)
    stripes[:, :, ::2, 0], stripes[:, :, 1::2, 2] = 1, 1  # red and blue columns, one pixel wide
    read = clips.through_mp4(stripes, tmp_path / "stripes.mp4")
    chroma = read[..., 0] - read[..., 2]  # 4:2:0 keeps one colour for two by two pixels
    assert abs(chroma.mean()) < 0.1 and np.abs(chroma[:, :, ::2] - chroma[:, :, 1::2]).mean() < 0.3
    assert clips.frames_of("decoded", stripes, tmp_path / "none.mp4") is stripes
    assert not (tmp_path / "none.mp4").exists()


def test_an_mp4_that_was_rescaled_is_refused(tmp_path):
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    with pytest.raises(ErtaError, match="export_to_video rescaled them"):
        clips.through_mp4(np.zeros((5, 24, 32, 3), np.float32), tmp_path / "odd.mp4")


def test_profile_over_frames_by_hand(tmp_path):
    """Mutants: the mean over frames instead of prompts, identical frames as zero decibels."""
    rows = [{"frames": {"psnr_db": values}} for values in ([20.0, 30.0, None], [40.0, None, None])]
    mean, std, identical = plots.frame_profile(rows)
    np.testing.assert_array_equal(mean, [30.0, 30.0, np.nan])
    np.testing.assert_array_equal(std, [10.0, 0.0, np.nan])
    assert identical == 3
    plots.psnr_per_frame(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_run_compares_decoded_frames_or_mp4_files(command, tmp_path):
    """Mutants: the metric of the other frames than the record says, mp4 files of one arm only."""
    pages, records = {}, {}
    for source in ("decoded", "mp4"):
        out = f"outputs/{source}"
        code, printed = command(
            "cache=uniform", "bench=fidelity", f"bench.frames_from={source}", f"hydra.run.dir={out}"
        )
        assert code == 0 and ("PSNR, dB of mp4 files" in printed) == (source == "mp4"), printed
        records[source] = json.loads(Path(out, "record.json").read_text())
        pages[source] = Path(out, "report.html").read_text()
        assert (
            records[source]["metrics"]["frames_from"] == source
            and len(records[source]["metrics"]["ms_ssim_betas"]) == 3
        )
        rows = read_lines(Path(out, "per_prompt.jsonl"))
        for row in rows:
            assert len(row["frames"]["psnr_db"]) == len(row["frames"]["ssim"]) == 5
            assert row["ssim"] == pytest.approx(np.mean(row["frames"]["ssim"]))
        assert (Path(out) / "figures" / "psnr_per_frame.png").is_file() and "PSNR by frame" in pages[source]
        assert "MS-SSIM (3 scales)" in pages[source]
    assert not Path("outputs/decoded/samples/mp4").exists()
    assert len(list(Path("outputs/mp4/samples/mp4").glob("*/*.mp4"))) == 6
    both = [records[source]["metrics"]["psnr_db"] for source in ("decoded", "mp4")]
    assert both[0] != pytest.approx(both[1], abs=1e-3)
    runs = load_runs(tmp_path / "outputs")
    assert runs["frames_from"].tolist() == ["decoded", "mp4"] and runs["psnr_db"].tolist() == both


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
    reference = scene_clip()
    noisy = np.clip(reference + np.random.default_rng(1).normal(0, 0.05, reference.shape), 0, 1).astype(np.float32)
    settings = dict(data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    # torchmetrics averages over the whole map with its mirrored borders, skimage's plain score leaves them out
    maps = [structural_similarity(a, b, full=True, **settings)[1] for a, b in zip(noisy, reference, strict=True)]
    wanted = np.mean(maps)
    assert ssim(noisy, reference) == pytest.approx(wanted, abs=2e-3)
    assert ssim(reference, reference) == pytest.approx(1.0, abs=1e-6)


def test_lpips_says_what_it_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert str(tmp_path) in (Lpips().missing or "")
