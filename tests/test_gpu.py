"""What only a CUDA device shows: its clocks, half precision, offloading, compiled blocks. Skipped where there is none."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import erta
import experiments.cli  # noqa: F401  (registers the schema)
from erta.trace import Stopwatch
from experiments.harness.generate import generate
from experiments.models.call import call_kwargs
from experiments.models.load import ASSETS, load_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPT = "a small red circle moving left on a dark background"
PICTURE = "a small red circle on a dark background"


def configured(*overrides: str):
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base=None):
        return compose("config", overrides=list(overrides))


def shipped_plan(cfg, **budget) -> erta.Plan:
    steps = cfg.model.num_inference_steps
    return erta.Calibration.load(ASSETS / cfg.model.name / f"calibration-{steps}.safetensors").plan(**budget)


def cached(cfg, steps: int):
    plan = shipped_plan(cfg, steps=steps)
    prompt = PICTURE if cfg.model.num_frames is None else PROMPT
    return generate(load_pipeline(cfg), prompt, 0, call_kwargs(cfg), lambda pipe: erta.cached(pipe, plan))


@pytest.mark.parametrize("model", ["wan21_tiny", "flux_tiny"])
def test_a_cached_run_is_what_the_cpu_makes(model, monkeypatch):
    """Mutants: coefficients left on the CPU, the grid on another device."""
    cfg = configured(f"model={model}")
    on_gpu = cached(cfg, 12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = cached(cfg, 12)
    assert on_gpu.forwards == on_cpu.forwards
    assert np.abs(on_gpu.frames - on_cpu.frames).mean() < 0.01


def test_nothing_reused_is_bit_identical():
    cfg = configured()
    pipe, kwargs = load_pipeline(cfg), call_kwargs(cfg)
    plain = generate(pipe, PROMPT, 0, kwargs)
    plan = shipped_plan(cfg, steps=50)
    whole = generate(pipe, PROMPT, 0, kwargs, lambda pipe: erta.cached(pipe, plan))
    assert np.array_equal(plain.frames, whole.frames)


def test_events_time_the_device_not_the_launch():
    """Mutant: a clock that reads the host's time, which only sees launches."""
    matrix, watch = torch.randn(8192, 8192, device="cuda"), Stopwatch()
    matrix @ matrix
    torch.cuda.synchronize()
    started = time.perf_counter()
    watch.start(matrix.device)
    for _ in range(20):
        matrix @ matrix
    watch.stop()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    whole = time.perf_counter() - started
    assert launched < 0.5 * whole and watch.seconds == pytest.approx(whole, rel=0.2)


def test_forwards_and_the_rest_add_up_to_the_denoising():
    sample = cached(configured(), 25)
    assert 0 < sample.forward_s < sample.denoise_s < sample.pipeline_s


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_runs_are_the_same(offload):
    whole = cached(configured("model=flux_tiny"), 15)
    offloaded = cached(configured("model=flux_tiny", f"model.offload={offload}"), 15)
    assert offloaded.forwards == whole.forwards == 15
    np.testing.assert_allclose(offloaded.frames, whole.frames, atol=0.02)


def test_half_precision_keeps_the_coefficients_in_single():
    """bfloat16 outputs; the cache is in bfloat16 too, the picture stays close to the one in float32."""
    with pytest.warns(UserWarning, match="made in torch.float32"):
        half = cached(configured("model=flux_tiny", "model.dtype=bfloat16"), 15)
    single = cached(configured("model=flux_tiny"), 15)
    assert half.cache_dtype == "bfloat16" and half.cache_bytes * 2 == single.cache_bytes
    assert np.abs(half.frames - single.frames).mean() < 0.05


def test_compiled_blocks_give_the_same_clip():
    plain = cached(configured(), 12)
    compiled = cached(configured("model.compile=true"), 12)
    assert np.abs(plain.frames - compiled.frames).mean() < 0.01
