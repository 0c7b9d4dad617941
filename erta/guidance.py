"""Guidance branches: what a pipeline calls them, which of them share a forward, how they are combined.

Many pipelines name the branch of a forward (their `cache_context`). Of those that do not, two things can be seen: a batch of
two or three times the samples holds so many branches, and a second forward at one step is the second branch. Such branches are
called after what was seen of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erta.errors import ErtaError, SignatureMismatch

BATCHED = "cond_uncond"  # of pipelines that run both branches as one batch (CogVideoX, LTX)
BATCH_ORDER = ("uncond", "cond")
SINGLE_BRANCH = "single"  # of pipelines that set no cache context: the first forward of a step, or its only one
CALLS = (SINGLE_BRANCH, "second call", "third call")  # at that step
IN_ONE_BATCH = {  # one forward whose batch is two or three times the samples
    "both halves": ("first half", "second half"),
    "three thirds": ("first third", "second third", "last third"),  # guidance by perturbed attention
}
PAIRS = (("cond", "uncond"), ("pred_cond", "pred_uncond"))  # as pipelines name them
VIDEO_AXES = 5
SMALL_MISFIT = 0.05  # of a frame that was made of the branches, among others that were not
LARGEST_MISFIT = 0.5  # of branches weighted to what was made of them, relative: beyond, it was made in another way


def guidance_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale of a pipeline call that goes by this name, from its arguments with defaults filled in."""
    return arguments.get("guidance_scale")


def true_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale of true guidance beside an embedded one (FLUX, QwenImage); None where the call does not use it."""
    scale = arguments.get("true_cfg_scale")
    negative = any(arguments.get(key) is not None for key in ("negative_prompt", "negative_prompt_embeds"))
    return float(scale) if negative and scale is not None and scale > 1 else None


def combining_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale by which a call combines its branches."""
    true = true_scale_of(arguments)
    return guidance_scale_of(arguments) if true is None else true


def second_scale_of(arguments: dict[str, Any]) -> float | None:
    """The scale under a pipeline's second transformer: `guidance_scale_2`, or that of the first if it is not given."""
    scale = arguments.get("guidance_scale_2")
    return combining_scale_of(arguments) if scale is None else scale


def unnamed_context(place: int, rows: int, samples: int | None, branches: Sequence[str] | None) -> str:
    """What a forward without a cache context is called.

    Args:
        place: 0 for the first such forward of a step.
        rows: of its batch.
        samples: that the call makes; None where it is not known.
        branches: that a plan knows; None in a run without one, where the batch alone can tell.

    Raises SignatureMismatch where the batch is not the plan's, ErtaError where no plan could tell the branches apart.
    """
    batched = next((name for name, parts in IN_ONE_BATCH.items() if _is_in(parts, rows, samples, branches)), None)
    parts = len(IN_ONE_BATCH.get(batched or "", (SINGLE_BRANCH,)))
    if samples is not None and rows != samples * parts:
        if branches is not None:
            planned = f"{len(branches)} branches, {samples * parts} rows"
            raise SignatureMismatch("the batch of a forward", planned, f"{rows} rows")
        raise ErtaError(
            f"{samples} sample{'s' if samples > 1 else ''} gave a batch of {rows}: its guidance branches cannot be told apart. "
            "Run with guidance off."
        )
    if place >= len(CALLS) or (batched is not None and place > 0):
        raise ErtaError(
            f"forward {place + 1} of one step is not of a known guidance branch (three are told apart). Run with guidance off."
        )
    return CALLS[place] if batched is None else batched


def _is_in(parts: Sequence[str], rows: int, samples: int | None, branches: Sequence[str] | None) -> bool:
    """Whether a batch holds these parts: by the plan's branches, without a plan by its rows."""
    if branches is not None:
        return set(parts) == set(branches)
    return samples is not None and rows == len(parts) * samples


def samples_of(arguments: dict[str, Any]) -> int | None:
    """How many samples a pipeline call makes: prompts times images (or videos) of each. None if that cannot be seen."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    given = embeds if prompt is None else prompt
    if given is None:
        return None
    prompts = 1 if isinstance(given, str) else len(given)
    for name, count in arguments.items():
        if is_count_per_prompt(name):
            prompts *= count or 1
    return prompts


def is_count_per_prompt(name: str) -> bool:
    """Whether a pipeline's argument is how many samples a prompt gives: `num_images_per_prompt` and the like."""
    return name.startswith("num_") and name.endswith("_per_prompt")


def branches_of(context: str, guidance_scale: float | None) -> tuple[str, ...]:
    """The guidance branches that a forward under a cache context (or what was seen in place of one) computes, in batch order."""
    if context in IN_ONE_BATCH:
        return IN_ONE_BATCH[context]
    if context != BATCHED:
        return (context,)
    return BATCH_ORDER if guidance_scale is not None and guidance_scale > 1 else ("cond",)


def split(value: torch.Tensor, branches: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A forward's tensor by branch."""
    return dict(zip(branches, value.chunk(len(branches)), strict=True))


def known_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """These two guidance branches, the conditional one first, if they have names that diffusers gives them."""
    return next((pair for pair in PAIRS if set(pair) == set(names)), None)


def guide(values: dict[str, torch.Tensor], guidance_scale: float | None) -> torch.Tensor:
    """What is integrated: `uncond + scale (cond - uncond)`. Raises ErtaError for branches it does not know."""
    if len(values) == 1:
        return next(iter(values.values()))
    pair = known_pair(values)
    if pair is None or guidance_scale is None:
        raise ErtaError(f"it is not known how the guidance branches {sorted(values)} are combined")
    cond, uncond = (values[branch] for branch in pair)
    return uncond + guidance_scale * (cond - uncond)


def weights_of(
    values: dict[str, torch.Tensor], made: torch.Tensor, sample: torch.Tensor | None = None
) -> tuple[float, ...] | None:
    """The weights of branches in what a pipeline made of them, by least squares; None if that is no sum of them.

    Pipelines differ in the order of their branches, in signs and in what they call the scale; what they give the solver does
    not. It may hold the `sample` too (Cosmos, which predicts the clean one). Norms that some set anew (`cfg_normalization`)
    leave a misfit. Frames that a pipeline sets itself (Cosmos 2.5, from a video that is continued) are left out.
    """
    if any(value.numel() != made.numel() for value in values.values()):
        return None
    sample = sample if sample is not None and sample.numel() == made.numel() else None
    found = _weights_and_misfit(values, made, sample)
    if found[1] > LARGEST_MISFIT and made.ndim == VIDEO_AXES:
        fitting = [
            k for k in range(made.shape[2]) if _weights_and_misfit(*_at([k], values, made, sample))[1] < SMALL_MISFIT
        ]
        if fitting:
            found = _weights_and_misfit(*_at(fitting, values, made, sample))
    return None if found[1] > LARGEST_MISFIT else found[0]


def _at(frames: list[int], values: dict[str, torch.Tensor], made: torch.Tensor, sample: torch.Tensor | None) -> Any:
    """Some frames of videos (batch, channels, frames, height, width)."""
    cut = {name: value.reshape(made.shape)[:, :, frames] for name, value in values.items()}
    return cut, made[:, :, frames], None if sample is None else sample.reshape(made.shape)[:, :, frames]


def _weights_and_misfit(
    values: dict[str, torch.Tensor], made: torch.Tensor, sample: torch.Tensor | None
) -> tuple[tuple[float, ...], float]:
    """Weights of the branches, and what they leave over, relative; not finite where something else is not."""
    first, *others = (value.double().flatten() for value in values.values())
    target, parts = made.double().flatten(), [first, *(other - first for other in others)]
    if sample is not None:
        parts.append(sample.double().flatten())
    basis = torch.stack(parts)
    if not torch.isfinite(basis).all():
        return (float("nan"),) * len(values), 0.0  # what is not finite is somebody else's to say
    sizes = basis.norm(dim=1, keepdim=True).clamp_min(1e-300)
    unit = basis / sizes
    weights = torch.linalg.pinv(unit @ unit.T, rtol=1e-10, hermitian=True) @ (unit @ target)
    misfit = (target - weights @ unit).norm() / target.norm().clamp_min(1e-300)
    along, *across = (weights / sizes[:, 0])[: len(values)].tolist()
    return (along - sum(across), *across), float(misfit)


@dataclass(frozen=True)
class Given:
    """Which part of a transformer's output the solver is given, where that is not the whole: tokens of references lie behind it
    (FLUX Kontext, Qwen edit), a frame that is kept lies before it (Sana's image-to-video).
    """

    axis: int
    start: int
    length: int

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """That part of an output."""
        return value.narrow(self.axis, self.start, self.length)


def given_part(x: torch.Tensor, velocity: torch.Tensor, sample: torch.Tensor) -> Given | None:
    """Where the solver's sample lies in the transformer's input `x`, and its part of the output too; None: it is the whole.

    Behind if it is found there, else before.
    """
    if x.ndim != sample.ndim or x.ndim != velocity.ndim:
        return None
    axes = [axis for axis in range(1, x.ndim) if sample.shape[axis] < velocity.shape[axis] == x.shape[axis]]
    if len(axes) != 1:
        return None
    (axis,), length = axes, sample.shape[axes[0]]
    behind = x.shape[axis] - length
    found = x.narrow(axis, behind, length)[: len(sample)]
    for other in set(range(1, x.ndim)) - {axis}:  # image-to-video appends channels
        found = found.narrow(other, 0, min(found.shape[other], sample.shape[other]))
    is_behind = found.shape == sample.shape and torch.equal(found.float(), sample.float())
    return Given(axis, behind if is_behind else 0, length)


def weighted(values: dict[str, torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """The branches, in their order, weighted."""
    return sum((weight * value for weight, value in zip(weights, values.values(), strict=True)), start=torch.zeros(()))


def expand(contexts: Iterable[str], guidance_scale: float | None) -> set[str]:
    """All branches under these contexts."""
    return {branch for context in contexts for branch in branches_of(context, guidance_scale)}
