"""What a calibration was made for, as plain data that can be compared field by field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError, SignatureMismatch
from erta.pipeline import boundary_ratio, find_denoiser, find_denoisers

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
        **({"boundary_ratio": boundary_ratio(pipe)} if 1 in transformers else {}),
    }


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
