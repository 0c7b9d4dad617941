"""Prompts as a user gives them, text or embeddings, as pipeline calls of one sample each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from erta.errors import ErtaError
from erta.guidance import is_count_per_prompt

PER_PROMPT = frozenset({"generator", "latents"})  # set for each prompt


def prompt_list(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list; a string is one prompt. Raises ErtaError for none, and for what is not text."""
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise ErtaError("at least one prompt is needed")
    wrong = next((prompt for prompt in given if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise ErtaError(
            f"a prompt is a text, not {type(wrong).__name__}: give the prompts of a batch one by one in one list"
        )
    return given


def single_calls(
    prompts: str | Sequence[str] | None, pipeline_kwargs: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """What each prompt is called in a record, and the arguments of its pipeline call.

    Args:
        prompts: texts; None where `prompt` or `prompt_embeds` is among the arguments. Embeddings of n rows are n prompts:
            other embeddings and masks of n rows are taken row by row with them.

    Raises ErtaError without any prompt, with text and embeddings, and for more than one sample a prompt.
    """
    if taken := sorted(PER_PROMPT & pipeline_kwargs.keys()):
        raise ErtaError(
            f"calibrate(…, {taken[0]}=…) is not read: each of prompts is run from the noise of seed and its number"
        )
    for name, count in pipeline_kwargs.items():
        if is_count_per_prompt(name) and count not in (None, 1):
            raise ErtaError(f"calibrate with one sample per prompt, without {name}: a plan fits any number of them")
    given = dict(pipeline_kwargs)
    if given.get("prompt") is not None:
        if prompts is not None:
            raise ErtaError("give the prompts once: as the second argument, or as prompt=")
        prompts = given.pop("prompt")
    name = next((name for name in given if name.startswith("prompt_embeds") and "mask" not in name), "prompt_embeds")
    embeds = given.get(name)
    if prompts is not None and embeds is not None:
        raise ErtaError("give prompts or prompt_embeds, not both")
    if prompts is not None:
        return [(text, {**given, "prompt": text}) for text in prompt_list(prompts)]
    if embeds is None or not len(embeds):
        raise ErtaError("calibration needs at least one prompt: give texts, or prompt_embeds=")
    if name != "prompt_embeds" and len(embeds) > 1:
        raise ErtaError(
            f"it is not known how {name} goes with the other embeddings: calibrate one prompt at a time, and merge"
        )
    return [(_name(embeds[row]), _row_of(given, row, len(embeds))) for row in range(len(embeds))]


def _row_of(arguments: dict[str, Any], row: int, rows: int) -> dict[str, Any]:
    """The arguments of one prompt out of those of a batch."""

    def is_of_batch(name: str, value: Any) -> bool:
        of_prompts = "embeds" in name or (name.endswith("mask") and "prompt" in name)
        return of_prompts and isinstance(value, (torch.Tensor, list)) and len(value) == rows

    return {name: v[row : row + 1] if is_of_batch(name, v) else v for name, v in arguments.items()}


def _name(embedding: torch.Tensor) -> str:
    """What an embedding is called in a record: a digest of its values."""
    values = embedding.detach().float().cpu().contiguous().numpy().tobytes()
    return f"embedding {hashlib.sha256(values).hexdigest()[:12]}"
