"""TeaCache's signal: the first block's input after modulation by the timestep, or on Wan and CogVideoX the time embedding.

One small adapter a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError
from erta.online import Call


def modulated_input(call: Call) -> torch.Tensor:
    """The signal of a call of the transformer, computed from its arguments and without its blocks.

    Raises InstallError for a transformer without an adapter.
    """
    adapter = ADAPTERS.get(type(call.transformer).__name__)
    if adapter is None:
        raise InstallError(
            f"cache=teacache has no signal for {type(call.transformer).__name__} (it knows {', '.join(ADAPTERS)}): "
            "add an adapter to experiments/peers/signals.py"
        )
    with torch.no_grad():
        return adapter(call.transformer, call.kwargs or {})


def _wan(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The time embedding `e`, (batch, width): the same for every prompt and branch."""
    embedder = transformer.condition_embedder
    frequencies = embedder.timesteps_proj(kwargs["timestep"].flatten())
    return embedder.time_embedder(frequencies.to(next(embedder.time_embedder.parameters()).dtype))


def _flux(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens after block 0's first norm, modulated by time, guidance and pooled text: (batch, tokens, width)."""
    tokens = transformer.x_embedder(kwargs["hidden_states"])
    conditions = [kwargs["timestep"].to(tokens.dtype) * 1000]
    if kwargs.get("guidance") is not None:
        conditions.append(kwargs["guidance"].to(tokens.dtype) * 1000)
    embedding = transformer.time_text_embed(*conditions, kwargs["pooled_projections"])
    return transformer.transformer_blocks[0].norm1(tokens, emb=embedding)[0]


def _cogvideox(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The time embedding, (batch, width)."""
    frequencies = transformer.time_proj(kwargs["timestep"])
    return transformer.time_embedding(frequencies.to(kwargs["hidden_states"].dtype), kwargs.get("timestep_cond"))


def _hunyuan_video(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens after block 0's first norm, modulated by time, guidance and pooled text: (batch, tokens, width)."""
    embedding = transformer.time_text_embed(kwargs["timestep"], kwargs["pooled_projections"], kwargs.get("guidance"))[0]
    return transformer.transformer_blocks[0].norm1(transformer.x_embedder(kwargs["hidden_states"]), emb=embedding)[0]


ADAPTERS: dict[str, Callable[[nn.Module, dict[str, Any]], torch.Tensor]] = {
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
}
