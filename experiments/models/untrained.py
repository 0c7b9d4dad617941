"""Pipelines of the real architectures at their real size with weights drawn at random: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from erta.errors import ErtaError
from experiments.models.architectures import describe
from experiments.models.classes import class_named
from experiments.models.load import check_true_guidance, compile_blocks, place, set_sampler
from experiments.scenes.tokenizer import build_tokenizer


def untrained_pipeline(cfg: DictConfig) -> Any:
    """The model's pipeline with its transformer in full size, random weights, and a text encoder of one thin layer.

    Raises ErtaError for a model whose pipeline cannot be put together this way.
    """
    check_true_guidance(class_named(cfg.model.pipeline), cfg.model)
    about = describe(cfg)
    name = about["class"]
    if cfg.model.pipeline not in BUILDERS or about.get("transformers", 1) > 1:
        raise ErtaError(f"experiment=speed knows Wan with one transformer, and FLUX; model={cfg.model.name} is neither")
    if not cfg.model.embedded and not torch.cuda.is_available():
        raise ErtaError(f"experiment=speed model={cfg.model.name} needs a GPU; model=wan21_tiny runs here")
    dtype = getattr(torch, cfg.model.dtype)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformer = _in_dtype(lambda: class_named(name)(**about["transformer"]), dtype).eval()
    for key, parameter in transformer.named_parameters():  # as from_pretrained keeps them
        if any(part in key.split(".") for part in transformer._keep_in_fp32_modules or ()):
            parameter.data = parameter.data.float()
    pipe = BUILDERS[cfg.model.pipeline](transformer, about, dtype)
    set_sampler(pipe, cfg)
    pipe.set_progress_bar_config(disable=True)
    compile_blocks(pipe, cfg.model)
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


BUILDERS: dict[str, Callable[..., Any]] = {"WanPipeline": _build_wan, "FluxPipeline": _build_flux}


def _in_dtype(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(usual)
