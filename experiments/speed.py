"""`experiment=speed model=…`: what ERTACache saves on this machine with the real architecture, without its weights.

Time and memory of a forward do not depend on the values of the weights, so they are drawn at random and nothing is
downloaded. Pictures are not made: the decoder and the real text encoder are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import erta
from erta.errors import ErtaError
from erta.session import latent_call
from experiments import console
from experiments.calibrating import progress_bar
from experiments.methods import planned
from experiments.model_card import describe
from experiments.models import call_kwargs, memory_advice, place, set_sampler
from experiments.record import describe_run, mark_finished, write_json
from experiments.sampling import now, possible_speedup
from experiments.training.text import build_tokenizer

PROMPT = "a red circle"  # any words will do
PLANNED = "experiments.methods.reuse"


def run(cfg: DictConfig, folder: Path) -> None:
    """Calibrate on one prompt, then generate uncached and cached in turns, `experiment.seeds` times."""
    with memory_advice(cfg):
        found = measure(cfg)
    write_json(folder / "speed.json", {**describe_run(cfg, list(range(cfg.experiment.seeds)), [PROMPT]), **found})
    steps = f"{found['computed']} of {cfg.model.num_inference_steps} steps computed, site {cfg.cache.site}"
    console.table(f"{cfg.model.name} with untrained weights: {steps}", ["", "measured"], shown(found))
    console.note(f"record: {folder / 'speed.json'}")
    mark_finished(folder)


def measure(cfg: DictConfig) -> dict[str, Any]:
    """Medians over the pairs, in seconds and bytes. Raises ErtaError for a cache without a plan."""
    if cfg.cache._target_ != PLANNED:
        raise ErtaError(
            f"experiment=speed times planned caches (ertacache, policy, uniform, …), not cache={cfg.cache.name}"
        )
    pipe = untrained_pipeline(cfg)
    kwargs = call_kwargs(cfg)
    plain: list[float] = []
    cached: list[dict[str, Any]] = []
    with progress_bar() as bar:
        task = bar.add_task("generate", total=2 + 2 * cfg.experiment.seeds)
        generate(pipe, {**kwargs, "num_inference_steps": 2})  # warm-up, not measured
        bar.advance(task)
        started = now()
        calibration = erta.calibrate(pipe, [PROMPT], site=cfg.cache.site, window=cfg.calibration.window, **kwargs)
        calibration_s = now() - started
        plan = planned(cfg, calibration)
        bar.advance(task)
        for seed in range(cfg.experiment.seeds):
            plain.append(generate(pipe, kwargs, seed))
            plain_peak = _peak_of_last()
            bar.advance(task)
            with erta.cached(pipe, plan) as trace:
                seconds = generate(pipe, kwargs, seed)
            cached_peak = _peak_of_last()
            calls = sum(map(len, trace.executed.values()))
            forwards = sum(trace.forwards.values())
            cached.append(
                {
                    "denoise_s": seconds,
                    "forward_s": trace.forward_s / forwards,
                    "hook_s": trace.overhead_s / calls,
                    "forwards": forwards,
                    "calls": calls,
                }
            )
            bar.advance(task)
    middle = sorted(cached, key=lambda one: one["denoise_s"])[len(cached) // 2]
    uncached_s = sorted(plain)[len(plain) // 2]
    calls, forwards = middle["calls"], middle["forwards"]
    forward_s = middle["forward_s"]
    rest_s = max(0.0, uncached_s / calls - forward_s)
    return {
        "untrained": True,
        "computed": plan.num_computed,
        "uncached_s": uncached_s,
        "cached_s": middle["denoise_s"],
        "speedup": uncached_s / middle["denoise_s"],
        "possible_speedup": possible_speedup(calls, forwards, forward_s, rest_s),
        "forwards": [calls, forwards],
        "forward_s": forward_s,
        "hook_share": middle["hook_s"] / forward_s,
        "calibration_s": calibration_s,
        "calibration_generations": calibration_s / uncached_s,
        "cache_bytes": trace.cache_bytes,
        "cache_dtype": trace.cache_dtype,
        "peak_gpu_bytes": {"uncached": plain_peak, "cached": cached_peak},
    }


def shown(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the printed table."""
    calls, forwards = found["forwards"]
    rows = [
        ["uncached", f"{found['uncached_s']:.2f} s, {calls} forwards"],
        ["cached", f"{found['cached_s']:.2f} s, {forwards} forwards"],
        ["speed-up", f"{found['speedup']:.3f}x, possible {found['possible_speedup']:.3f}x"],
        ["one forward", f"{1000 * found['forward_s']:.1f} ms"],
        ["hook, share of a forward", f"{100 * found['hook_share']:.2f} %"],
        ["calibration of one prompt", f"{found['calibration_generations']:.2f} generations"],
        ["cache", f"{found['cache_bytes']:,} bytes ({found['cache_dtype'] or 'empty'})"],
    ]
    peaks = [peak for peak in found["peak_gpu_bytes"].values() if peak is not None]
    if peaks:
        rows.append(["peak GPU memory", " → ".join(f"{peak / 2**30:.2f} GiB" for peak in peaks)])
    return rows


def untrained_pipeline(cfg: DictConfig) -> Any:
    """The model's pipeline with its transformer in full size, random weights, and a text encoder of one thin layer.

    Raises ErtaError for a model whose pipeline cannot be put together this way.
    """
    about = describe(cfg)
    name = about["class"]
    if name not in BUILDERS or about.get("transformers", 1) > 1:
        raise ErtaError(f"experiment=speed knows Wan with one transformer, and FLUX; model={cfg.model.name} is neither")
    if not cfg.model.embedded and not torch.cuda.is_available():
        raise ErtaError(f"experiment=speed model={cfg.model.name} needs a GPU; model=wan21_tiny runs here")
    dtype = getattr(torch, cfg.model.dtype)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = _in_dtype(lambda: getattr(diffusers, name)(**about["transformer"]), dtype).eval()
    for key, parameter in transformer.named_parameters():  # as from_pretrained keeps them
        if any(part in key.split(".") for part in transformer._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    pipe = BUILDERS[name](transformer, about, dtype)
    set_sampler(pipe, cfg)
    pipe.set_progress_bar_config(disable=True)
    return place(pipe, cfg.model)


def _build_wan(transformer: nn.Module, about: dict[str, Any], dtype: torch.dtype) -> Any:
    tokenizer, (_, width) = build_tokenizer(), about["text"]
    config = UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    text_encoder = _in_dtype(lambda: UMT5EncoderModel(config), dtype).eval()
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=scheduler, transformer=transformer
    )
    pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = about["latent"]["space"], about["latent"]["time"]
    return pipe


def _build_flux(transformer: nn.Module, about: dict[str, Any], dtype: torch.dtype) -> Any:
    tokenizer, (_, width) = build_tokenizer(), about["text"]
    words = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    pooled = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=transformer.config.pooled_projection_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=1,
    )
    short = build_tokenizer()
    short.model_max_length = pooled.max_position_embeddings
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=_in_dtype(lambda: CLIPTextModel(pooled), dtype).eval(),
        tokenizer=short,
        text_encoder_2=_in_dtype(lambda: T5EncoderModel(words), dtype).eval(),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipe.vae_scale_factor = about["latent"]["space"]
    return pipe


BUILDERS: dict[str, Callable[..., Any]] = {"WanTransformer3DModel": _build_wan, "FluxTransformer2DModel": _build_flux}


def _in_dtype(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(usual)


def generate(pipe: Any, kwargs: dict[str, Any], seed: int = 0) -> float:
    """Seconds of one call that ends in latents."""
    started = now()
    pipe(**latent_call(PROMPT, seed, kwargs))
    return now() - started


def _peak_of_last() -> int | None:
    """Most bytes held on the GPU since the last look."""
    if not torch.cuda.is_available():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
