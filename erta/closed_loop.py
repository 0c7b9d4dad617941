"""The rectifier fitted along the cached trajectory, instead of the uncached one.

The paper fits on uncached trajectories (open loop), but at inference the model sees inputs that earlier reuse
has already moved. Here a plan is run with its cache on, the transformer is evaluated at reused steps as well,
and the coefficients are fitted to what is found there. Costs one uncached run a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from erta.architectures import architecture_of
from erta.errors import ErtaError, NonFiniteError, choice_index
from erta.guidance import branches_of, split
from erta.options import RECTIFIERS
from erta.pipeline import find_denoiser, latent_call
from erta.plan import Plan, Rectification
from erta.prompts import prompt_list
from erta.rectifier import Moments, fit_linear
from erta.session import cached, planned_session
from erta.statistics import channel_moments


def refit(
    pipe: Any,
    plan: Plan,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    rectifier: str = "channel",
    on_prompt: Callable[[int], None] | None = None,
    **pipeline_kwargs: Any,
) -> Plan:
    """`plan` with its rectification fitted along the trajectory that it produces itself.

    Args:
        plan: with the branches it was calibrated for; its own rectification, if any, is on while fitting.
        prompts: not those of a test. Prompt k starts from the noise of seed + k, as in `erta.calibrate`.
        rectifier: coefficients by `channel`, or one `scalar` pair for each step and branch.
        on_prompt: called after every prompt with its number.

    Raises ErtaError without prompts, or for a plan that reuses nothing.
    """
    texts = prompt_list(prompts)
    if plan.branches is None or all(plan.mask):
        raise ErtaError("only a plan from a calibration, with reused steps, can be fitted again")
    choice_index("rectifier", rectifier, RECTIFIERS)
    moments: Moments | None = None
    for index, prompt in enumerate(texts):
        one = _observe(pipe, plan, prompt, seed + index, pipeline_kwargs)
        moments = one if moments is None else moments.merge(one)
        if on_prompt is not None:
            on_prompt(index)
        if not all(np.isfinite(getattr(moments, item.name)).all() for item in fields(moments)):
            raise NonFiniteError(f"prompt {index + 1} ({prompt!r}): an output along the plan is not finite")
    assert moments is not None
    fit = fit_linear(moments.pooled() if rectifier == "scalar" else moments)
    reused = ~np.array(plan.mask)[:, None, None] & np.ones_like(fit.gain, dtype=bool)
    form = plan.rectification.form if plan.rectification is not None else "linear"
    rectification = Rectification(np.where(reused, fit.gain, 1.0), np.where(reused, fit.offset, 0.0), form)
    r2 = [None if computed else float(fit.r2[i].mean()) for i, computed in enumerate(plan.mask)]
    report = {
        **plan.report,
        "rectify": True,
        "rectifier": f"{rectifier}, {form}, closed loop",
        "rectifier_r2": r2,
    }
    return replace(plan, rectification=rectification, report=report)


def _observe(pipe: Any, plan: Plan, prompt: str, seed: int, kwargs: dict[str, Any]) -> Moments:
    """Moments (num_steps, branches, channels) of one cached run; empty at computed steps."""
    found: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    branches, architecture = plan.branches or (), architecture_of(find_denoiser(pipe))

    def note(step: int, context: str, v_cached: torch.Tensor, true_velocity: Callable[[], torch.Tensor]) -> None:
        names = branches_of(context, plan.guidance_scale)
        truth = split(true_velocity().float(), names)
        for name, value in split(v_cached.float(), names).items():
            axis = architecture.channel_axis_of(value)
            sums = channel_moments(value, value - truth[name], axis)
            found[step, branches.index(name)] = sums, value.numel() // value.shape[axis]

    with cached(pipe, plan):
        planned_session(pipe).show_reuse(note)
        pipe(**latent_call(prompt, seed, kwargs))
    channels = next(iter(found.values()))[0].shape[1]
    arrays = np.zeros((6, plan.num_steps, len(branches), channels))
    for (step, branch), (sums, count) in found.items():
        arrays[0, step, branch], arrays[1:, step, branch] = count, sums.cpu().numpy()
    return Moments(*arrays)
