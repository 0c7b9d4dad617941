"""The call of a model's pipeline: its arguments, and the grid that it integrates."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from erta.errors import ErtaError
from erta.pipeline import takeover_step
from erta.scheduler import nominal_sigmas


def call_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """The pipeline's arguments of one generation, without prompt and seed."""
    model = cfg.model
    keys = ["num_inference_steps", "guidance_scale", "guidance_scale_2", "height", "width", "num_frames"]
    kwargs = {key: model[key] for key in [*keys, "max_sequence_length", "true_cfg_scale"]}
    if model.true_cfg_scale is not None:
        kwargs["negative_prompt"] = ""
    return {key: value for key, value in kwargs.items() if value is not None}


class _GridIsSet(Exception):
    """Ends a pipeline call as soon as its grid is known."""


@dataclass(frozen=True)
class CallGrid:
    """The nominal grid of a pipeline call, (num_steps + 1,), and where a second transformer takes over on it.

    `takeover` is a step, num_steps if the second never runs, None if there is one transformer.
    """

    sigmas: np.ndarray
    takeover: int | None


def call_grid(pipe: Any, kwargs: dict[str, Any]) -> CallGrid:
    """The grid of a pipeline call, with its text encoding and without its denoising.

    The pipeline itself is asked: some bring their own sigmas or a shift by image size (FLUX, HunyuanVideo).
    """
    own, base = pipe.scheduler, type(pipe.scheduler)

    @functools.wraps(base.set_timesteps)  # pipelines inspect the signature for `sigmas`
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        base.set_timesteps(self, *args, **options)
        raise _GridIsSet

    probe = copy.deepcopy(own)
    probe.__class__ = type(base.__name__, (base,), {"set_timesteps": set_timesteps, "__module__": base.__module__})
    pipe.scheduler = probe
    try:
        pipe(prompt="", output_type="latent", generator=torch.Generator("cpu").manual_seed(0), **kwargs)
    except _GridIsSet:
        return CallGrid(nominal_sigmas(probe), takeover_step(pipe, probe.timesteps))
    finally:
        pipe.scheduler = own
        pipe.maybe_free_model_hooks()
    raise ErtaError(f"{type(pipe).__name__} denoised without setting a grid of steps")
