"""What a calibration was made for, as plain data that can be compared field by field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError, SignatureMismatch

SAMPLES_PER_TENSOR = 32
MUST_MATCH = (
    "model_class",
    "model_config",
    "weights",
    "scheduler",
    "sigmas",
    "guidance_scale",
    "guidance_scale_2",
    "boundary_ratio",
    "takeover",
    "latent_shape",
    "branches",
    "site",
)


def find_denoisers(pipe: Any) -> dict[int, nn.Module]:
    """The pipeline's transformers by stage: 0 is `transformer`, 1 is `transformer_2`, which takes over below a boundary.

    Raises InstallError if there is none, if the two are of different classes, or if the pipeline has no
    `boundary_ratio` to say when the second takes over.
    """
    named = (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None))
    found = {stage: transformer for stage, transformer in enumerate(named) if transformer is not None}
    if not found:
        raise InstallError(f"{type(pipe).__name__} has no transformer to cache (a U-Net is not supported)")
    if len({type(transformer) for transformer in found.values()}) > 1:
        raise InstallError(f"{type(pipe).__name__} has two transformers of different classes, which is not supported")
    if 1 in found and "boundary_ratio" not in pipe.config:
        raise InstallError(
            f"it is not known when transformer_2 of {type(pipe).__name__} runs: it has no boundary_ratio"
        )
    return found


def find_denoiser(pipe: Any) -> nn.Module:
    """The first of the pipeline's transformers: for what both have in common, class and dtype. See `find_denoisers`."""
    return next(iter(find_denoisers(pipe).values()))


def single_denoiser(pipe: Any) -> nn.Module:
    """The pipeline's only transformer. Raises InstallError where there are two (Wan 2.2): see `find_denoisers`."""
    found = find_denoisers(pipe)
    if len(found) > 1:
        raise InstallError(
            f"{type(pipe).__name__} has two transformers, and this cache knows pipelines with one: use a planned "
            "cache (cache=ertacache, policy, uniform), or leave transformer_2 out"
        )
    return next(iter(found.values()))


def takeover_step(pipe: Any, timesteps: torch.Tensor) -> int | None:
    """The step from which `transformer_2` runs, out of a call's timesteps; None without one.

    0 if it runs from the first step on, len(timesteps) if it never does. A pipeline whose `boundary_ratio` is None
    runs its first transformer only.
    """
    if 1 not in find_denoisers(pipe):
        return None
    boundary = _boundary_ratio(pipe) * pipe.scheduler.config.num_train_timesteps
    return int((timesteps >= boundary).sum())


def model_signature(pipe: Any) -> dict[str, Any]:
    """Model class, configuration and weights, the scheduler, the boundary: what can be known before a call.

    Of two transformers, both digests count.
    """
    transformers, scheduler = find_denoisers(pipe), pipe.scheduler
    return {
        "model_class": type(find_denoiser(pipe)).__name__,
        "model_config": " + ".join(config_digest(transformer.config) for transformer in transformers.values()),
        "weights": " + ".join(weights_digest(transformer) for transformer in transformers.values()),
        "scheduler": f"{type(scheduler).__name__} {config_digest(scheduler.config)}",
        **({"boundary_ratio": _boundary_ratio(pipe)} if 1 in transformers else {}),
    }


def _boundary_ratio(pipe: Any) -> float:
    """0 where there is none: no timestep lies below it."""
    return float(pipe.config.boundary_ratio or 0.0)


def config_digest(config: Any) -> str:
    """Short digest of a diffusers config; private entries (names, versions) do not count."""
    public = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(public, sort_keys=True, default=str).encode()).hexdigest()[:12]


def weights_digest(module: nn.Module) -> str:
    """Short digest of all parameter names and shapes and a few values of each, rounded to bfloat16.

    Reads 32 values a tensor, not the whole model, and does not depend on the dtype it was loaded in. Under sequential
    offload it reads accelerate's copy on the CPU. Raises InstallError for a meta parameter that nothing stands behind.
    """
    digest, samples = hashlib.sha256(), []
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type == "meta":
            parameter = _offloaded(module, name)
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        samples.append(flat[::stride][:SAMPLES_PER_TENSOR].to(torch.bfloat16))
    by_device = torch.cat([sample.to(samples[0].device) for sample in samples])
    digest.update(by_device.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _offloaded(module: nn.Module, name: str) -> torch.Tensor:
    """The values that accelerate's hook puts in the place of a meta parameter for the length of a forward."""
    owner, _, own_name = name.rpartition(".")
    hook = getattr(module.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[own_name]
    raise InstallError(
        f"{name} is on the meta device and has no values: a calibration cannot be matched to these weights. Load them "
        "first."
    )


def check_signature(made_for: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise SignatureMismatch at the first field of `found` that differs; fields that are None match anything."""
    for field in MUST_MATCH:
        wanted, now = made_for.get(field), found.get(field)
        if field in found and wanted is not None and wanted != now:
            raise SignatureMismatch(field, wanted, now)
