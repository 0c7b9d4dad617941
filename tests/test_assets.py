"""The shipped pipelines: they load like any other, draw what they are asked for, and their calibrations fit them."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxPipeline, WanPipeline
from hydra import compose, initialize_config_dir
from transformers import CLIPModel

import erta
from experiments.harness.arm import Arm
from experiments.harness.calibrations import get_calibration
from experiments.harness.config import CONF
from experiments.harness.generate import generate
from experiments.harness.pair import Clock
from experiments.harness.setup import Setup
from experiments.models.call import call_kwargs
from experiments.models.load import ASSETS, load_pipeline
from experiments.prompts.choose import calibration_prompts, test_prompts
from experiments.scenes import CHANCE_LEVEL, agreement, read_clip, render, sample_scene

FOLDER = ASSETS / "wan21_tiny"
test_prompts.__test__ = False


def default_config(*overrides: str):

    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline(default_config())


def test_loads_with_diffusers_alone():
    pipe = WanPipeline.from_pretrained(FOLDER)
    assert type(pipe.vae) is AutoencoderKLWan and pipe.scheduler.config.flow_shift == 8.0
    pipe.set_progress_bar_config(disable=True)
    clip = pipe("a red circle", height=64, width=64, num_frames=9, num_inference_steps=2).frames[0]
    assert clip.shape == (9, 64, 64, 3)


def test_the_image_model_loads_with_diffusers_alone_and_shares_its_text_tower():
    """FluxPipeline's pooled encoder is the text half of clip_tiny, weight for weight."""
    pipe = FluxPipeline.from_pretrained(ASSETS / "flux_tiny")
    assert type(pipe.vae) is AutoencoderKL and pipe.transformer.config.guidance_embeds
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", height=64, width=64, num_inference_steps=2, max_sequence_length=32).images[0]
    assert image.size == (64, 64)
    clip = CLIPModel.from_pretrained(ASSETS / "clip_tiny").state_dict()
    tower = pipe.text_encoder.state_dict()
    for name, tensor in tower.items():
        torch.testing.assert_close(tensor, clip[name if name in clip else f"text_model.{name}"], rtol=0, atol=0)


def test_all_weights_fit_the_repository():
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert total <= 40 * 2**20
    assert not list(ASSETS.rglob("*.bin")) and not list(ASSETS.rglob("*.pt"))


def test_no_path_of_the_machine_is_shipped():
    for path in ASSETS.rglob("*.json"):
        assert "/root" not in path.read_text() and json.loads(path.read_text()) is not None, path


@pytest.mark.parametrize(("model", "steps"), [("wan21_tiny", 50), ("flux_tiny", 30)])
def test_shipped_calibration_is_used(model, steps):
    cfg = default_config(f"model={model}")
    calibration = get_calibration(Setup(cfg))
    assert calibration.record["prompts"] == calibration_prompts(cfg)
    (path,) = (ASSETS / model).glob(f"calibration-{steps}.safetensors")
    assert calibration.num_steps == steps and path.stat().st_size <= 5e6


def test_forward_leaves_most_time_to_the_transformer_and_the_hook_costs_little(shipped):
    cfg = default_config()
    plan = get_calibration(Setup(cfg, shipped)).plan(steps=25)
    prompt = test_prompts(cfg)[0]
    generate(shipped, prompt.text, 0, {**call_kwargs(cfg), "num_inference_steps": 2})
    sample = generate(shipped, prompt.text, prompt.seed, call_kwargs(cfg), lambda pipe: erta.cached(pipe, plan))
    assert sample.forwards == 50 and sample.forward_s > 0.5 * sample.denoise_s
    assert sample.overhead_s / sample.overhead_calls < 0.05 * sample.forward_s / sample.forwards


@pytest.mark.slow
def test_the_clock_gets_what_the_plan_allows(shipped):
    """Over alternating pairs, the speed-up is at least 0.97 of N (F + s) / (K F + N s); the hook takes at most 1 %.

    Other processes only ever lower it, so the quieter half of the pairs counts, and the best of three rounds.
    Mutants: a reused step that runs the transformer all the same, a copy of the latent at every step.
    """
    cfg = default_config()
    setup = Setup(cfg, shipped)
    calibration = get_calibration(setup)
    arm = Arm(calibration.plan(speedup=2.0), setup.kwargs, calibration)
    prompt, reached = test_prompts(cfg)[0], False
    generate(shipped, prompt.text, 0, {**arm.kwargs, "num_inference_steps": 2})
    for _ in range(3):
        rows = []
        for seed in range(10):
            sides = {"uncached": Arm(None, arm.kwargs), "cached": arm}
            order = sorted(sides, reverse=seed % 2 == 0)
            made = {name: generate(shipped, prompt.text, seed, arm.kwargs, sides[name].put_on) for name in order}
            rows.append({name: asdict(sample) for name, sample in made.items()})
        rows.sort(key=lambda row: row["uncached"]["denoise_s"] + row["cached"]["denoise_s"])
        clock = Clock(setup, arm, rows[:5])
        speedups, overhead = clock.speedups(), clock.timing().hook_overhead_of_forward
        speedup, possible = speedups["speedup_denoise"], speedups["speedup_possible"]
        print(f"\nspeed-up {speedup:.3f}, possible {possible:.3f}; hook {overhead:.2%} of a forward")
        reached = speedup >= 0.97 * possible and overhead <= 0.01
        if reached:
            break
    assert reached


@pytest.mark.slow
def test_autoencoder_keeps_what_matters(shipped):
    rng, passed, psnr = np.random.default_rng(11), [], []
    for _ in range(10):
        scenes = [sample_scene(rng, "test") for _ in range(20)]
        clips = np.stack([render(scene, rng) for scene in scenes])
        with torch.no_grad():
            latents = shipped.vae.encode(torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
            decoded = ((shipped.vae.decode(latents).sample + 1) / 2).permute(0, 2, 3, 4, 1).numpy()
        passed += [agreement(s, read_clip(c))["all"] for s, c in zip(scenes, decoded, strict=True)]
        psnr += [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(clips, decoded, strict=True)]
    print(f"\nautoencoder: all attributes {np.mean(passed):.1%}, 5th percentile {np.quantile(psnr, 0.05):.2f} dB")
    assert np.mean(passed) >= AUTOENCODER_PASSES and np.quantile(psnr, 0.05) >= AUTOENCODER_DB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "forwards"), [("wan21_tiny", {"cond": 25, "uncond": 25}), ("flux_tiny", {"cond": 15})]
)
def test_ertacache_on_the_shipped_model(model, forwards):
    cfg = default_config(f"model={model}")
    pipe = load_pipeline(cfg)
    plan = get_calibration(Setup(cfg, pipe)).plan(speedup=2.0)
    prompt = test_prompts(cfg)[0]
    kwargs = {**call_kwargs(cfg), "output_type": "latent"}
    (plain,) = pipe(prompt.text, generator=torch.Generator().manual_seed(0), return_dict=False, **kwargs)
    with erta.cached(pipe, plan) as trace:
        (cached,) = pipe(prompt.text, generator=torch.Generator().manual_seed(0), return_dict=False, **kwargs)
    assert trace.forwards == forwards
    assert 0 < (cached - plain).abs().mean() < 0.5 * plain.abs().mean()


# what the shipped weights reach, with a margin for 40 prompts; raise with better weights
AUTOENCODER_PASSES, AUTOENCODER_DB = 0.97, 28.5
UNCACHED_AT_LEAST = {
    "wan21_tiny": {"colour": 0.95, "background": 0.95, "motion": 0.9, "shape": 0.85, "all": 0.8},
    "flux_tiny": {"colour": 0.93, "background": 0.95, "shape": 0.87, "all": 0.83},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", UNCACHED_AT_LEAST)
def test_uncached_samples_show_what_was_asked(model):
    """30 held-out prompts here; the README's figures are from more."""
    cfg = default_config(f"model={model}", "bench.num_prompts=30", "seed=5")
    pipe, results = load_pipeline(cfg), []
    for prompt in test_prompts(cfg):
        sample = generate(pipe, prompt.text, prompt.seed, call_kwargs(cfg))
        results.append(agreement(prompt.scene, read_clip(sample.frames)))
    keys = [key for key in (*CHANCE_LEVEL, "all") if any(key in r for r in results)]
    rates = {key: np.mean([r[key] for r in results if key in r]) for key in keys}
    print("\n", {key: f"{rate:.1%} (chance {CHANCE_LEVEL.get(key, 0):.0%})" for key, rate in rates.items()})
    for key, least in UNCACHED_AT_LEAST[model].items():
        assert rates[key] >= least, (key, rates)
