"""What a calibration was made for, as plain data that can be compared field by field."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from erta.architectures import at_rest
from erta.errors import InstallError, SignatureMismatch
from erta.guidance import guidance_scale_of, second_scale_of, true_scale_of
from erta.pipeline import boundary_ratio, find_denoiser, find_denoisers
from erta.plan import Plan

SAMPLES_PER_TENSOR = 32
MUST_MATCH = (
    "model_class",
    "model_config",
    "weights",
    "scheduler",
    "sigmas",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "adapters",
    "lora_scale",
    "strength",
    "begin",
    "boundary_ratio",
    "takeover",
    "latent_shape",
    "branches",
    "site",
)


def model_signature(pipe: Any) -> dict[str, Any]:
    """Model class, configuration and weights, adapters, the scheduler, the boundary: what can be known before a call.

    Of two transformers, both digests count.
    """
    transformers = find_denoisers(pipe)
    return {
        "model_class": type(find_denoiser(pipe)).__name__,
        "model_config": " + ".join(config_digest(transformer.config) for transformer in transformers.values()),
        "weights": " + ".join(weights_digest(transformer) for transformer in transformers.values()),
        **_changeable(pipe),
    }


def _changeable(pipe: Any) -> dict[str, Any]:
    """What of `model_signature` may change from call to call and is quickly looked at."""
    transformers, scheduler = find_denoisers(pipe), pipe.scheduler
    return {
        "scheduler": f"{type(scheduler).__name__} {config_digest(scheduler.config)}",
        "adapters": " + ".join(adapters_in_use(transformer) for transformer in transformers.values()),
        **({"boundary_ratio": boundary_ratio(pipe)} if 1 in transformers else {}),
    }


def passing_signature(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """What can be known of one call before it begins: scheduler and adapters as they are now, and its arguments."""
    return {**_changeable(pipe), **argument_signature(arguments)}


def argument_signature(arguments: dict[str, Any]) -> dict[str, Any]:
    """What of a call's arguments changes the model's outputs in a way that a plan is made for."""
    kwargs = (arguments.get(f"{kind}attention_kwargs") for kind in ("", "joint_", "cross_"))
    scales = [given["scale"] for given in kwargs if given and given.get("scale") is not None]
    strength = arguments.get("strength")
    return {
        "true_cfg_scale": true_scale_of(arguments) or 1.0,
        "lora_scale": float(scales[0]) if scales else 1.0,
        "strength": None if strength is None else float(strength),
    }


def check_arguments(plan: Plan, arguments: dict[str, Any]) -> None:
    """Raise SignatureMismatch for a call's number of steps and guidance if they are not the plan's."""
    given, steps = argument_signature(arguments), arguments.get("num_inference_steps")
    made_for = plan.signature or {}
    if made_for.get("strength") not in (None, given["strength"]):
        of = f"{made_for['strength']:g}, which runs {plan.num_steps} of {plan.begin + plan.num_steps} steps,"
        raise SignatureMismatch("strength", of, given["strength"])
    own_steps = any(arguments.get(name) is not None for name in ("sigmas", "timesteps"))  # those count, not the number
    if steps is not None and not own_steps and steps != plan.begin + plan.num_steps:
        raise SignatureMismatch("num_inference_steps", plan.begin + plan.num_steps, steps)
    scale, second = guidance_scale_of(arguments), second_scale_of(arguments)
    if plan.guidance_scale is not None and scale is not None and scale != plan.guidance_scale:
        raise SignatureMismatch("guidance_scale", plan.guidance_scale, scale)
    if plan.guidance_scale_2 is not None and second != plan.guidance_scale_2:
        raise SignatureMismatch("guidance_scale_2", plan.guidance_scale_2, second)


def adapters_in_use(transformer: nn.Module) -> str:
    """The adapters (LoRA) that are switched on, with their scales, and a digest of where; `none` without any.

    PEFT's layers are known by what they have, `scaling` by adapter and `active_adapters`. Merged ones count by their names:
    they are in the weights.
    """
    found: dict[str, set[float]] = {}
    where = hashlib.sha256()
    with at_rest(transformer):
        modules = [*transformer.named_modules()]
    for name, module in modules:
        scaling, active = getattr(module, "scaling", None), getattr(module, "active_adapters", None)
        if not isinstance(scaling, dict) or not isinstance(active, (list, tuple, set)):
            continue
        merged = getattr(module, "merged_adapters", ())
        for adapter in () if getattr(module, "disable_adapters", False) else merged or active:
            if scaling.get(adapter):
                found.setdefault(adapter, set()).add(float(scaling[adapter]))
                where.update(f"{name} {adapter} {scaling[adapter]:.6g}\n".encode())
    if not found:
        return "none"
    named = ", ".join(f"{adapter} × {'/'.join(f'{s:g}' for s in sorted(scales))}" for adapter, scales in found.items())
    return f"{named} ({where.hexdigest()[:8]})"


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
    with at_rest(module):
        parameters = sorted(module.named_parameters())
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        if parameter.device.type == "meta":
            parameter = offloaded_weight(module, name)
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        samples.append(flat[::stride][:SAMPLES_PER_TENSOR].to(torch.bfloat16))
    by_device = torch.cat([sample.to(samples[0].device) for sample in samples])
    digest.update(by_device.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def offloaded_weight(module: nn.Module, name: str) -> torch.Tensor:
    """The values that accelerate's hook puts in the place of a meta parameter for the length of a forward.

    Raises InstallError where nothing stands behind it.
    """
    owner, _, own_name = name.rpartition(".")
    hook = getattr(module.get_submodule(owner), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[own_name]
    raise InstallError(
        f"{name} is on the meta device and has no values: this transformer cannot run, nor be matched to a calibration. "
        "Load its weights first."
    )


def check_signature(made_for: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise SignatureMismatch at the first field of `found` that differs; fields that are None match anything."""
    for field in MUST_MATCH:
        wanted, now = made_for.get(field), found.get(field)
        if field in found and wanted is not None and wanted != now:
            raise SignatureMismatch(field, wanted, now)
