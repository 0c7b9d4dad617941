"""Guidance branches: what a pipeline calls them, which of them share a forward, how they are combined."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from erta.errors import ErtaError

BATCHED = "cond_uncond"  # of pipelines that run both branches as one batch (CogVideoX, LTX)
BATCH_ORDER = ("uncond", "cond")
SINGLE_BRANCH = "single"  # of pipelines that set no cache context


def guidance_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale of a pipeline call, from its arguments with defaults filled in.

    Raises ErtaError for true guidance beside an embedded one (FLUX with a negative prompt): not built yet.
    """
    negative = any(arguments.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds"))
    if negative and (arguments.get("true_cfg_scale") or 1) > 1:
        raise ErtaError("true_cfg_scale with a negative prompt is not supported: leave one of them out")
    return arguments.get("guidance_scale")


def second_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale under a pipeline's second transformer: `guidance_scale_2`, or that of the first if it is not given."""
    scale = arguments.get("guidance_scale_2")
    return guidance_scale_of(arguments) if scale is None else scale


def branches_of(context: str, guidance_scale: float | None) -> tuple[str, ...]:
    """The guidance branches that a forward under a pipeline's `cache_context` computes, in batch order."""
    if context != BATCHED:
        return (context,)
    return BATCH_ORDER if guidance_scale is not None and guidance_scale > 1 else ("cond",)


def split(value: torch.Tensor, branches: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A forward's tensor by branch."""
    return dict(zip(branches, value.chunk(len(branches)), strict=True))


def guide(values: dict[str, torch.Tensor], guidance_scale: float | None) -> torch.Tensor:
    """What is integrated: `uncond + scale (cond - uncond)`. Raises ErtaError for branches it does not know."""
    if len(values) == 1:
        return next(iter(values.values()))
    if set(values) != set(BATCH_ORDER) or guidance_scale is None:
        raise ErtaError(f"it is not known how the guidance branches {sorted(values)} are combined")
    return values["uncond"] + guidance_scale * (values["cond"] - values["uncond"])


def expand(contexts: Iterable[str], guidance_scale: float | None) -> set[str]:
    """All branches under these contexts."""
    return {branch for context in contexts for branch in branches_of(context, guidance_scale)}
