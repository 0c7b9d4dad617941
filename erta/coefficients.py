"""A plan's rectification as tensors on the device of the latent."""

from __future__ import annotations

from typing import Any

import torch

from erta.architectures import Architecture
from erta.guidance import branches_of
from erta.plan import Plan, Rectification


class Coefficients:
    """The plan's rectification as tensors on the latent's device, laid out once a context."""

    def __init__(self, plan: Plan, architecture: Architecture) -> None:
        self.plan, self.architecture = plan, architecture
        self.device: torch.device | None = None
        self.tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def rectify(self, velocity: torch.Tensor, step: int, context: str) -> torch.Tensor:
        """`v_cached - err_hat` with the coefficients of this step, guidance branch and channel (ERTACache, "Explicit error
        rectification").

        In float32, since a gain of 0.98 has no room in bfloat16.
        """
        rect = self.plan.rectification
        if rect is None:
            return velocity
        if velocity.device != self.device:
            self.device, self.tensors = velocity.device, {}
        if context not in self.tensors:
            self.tensors[context] = self._lay_out(rect, velocity, context)
        gain, offset = self.tensors[context]
        parts, value = gain.shape[1], velocity.float()
        value = value.unflatten(0, (parts, -1))  # both branches in one batch: (branch, sample, …)
        rectified = torch.addcmul(offset[step], gain[step], value)
        if rect.form == "sigmoid":  # err_hat = sigmoid(K v + B), whose linearisation is v - rectified
            rectified = value - torch.sigmoid(4 * (value - rectified) - 2)
        return rectified.flatten(0, 1).to(velocity.dtype)

    def _lay_out(self, rect: Rectification, velocity: torch.Tensor, context: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Gain and offset as (steps, branches in this context, 1, … channels …)."""
        known = self.plan.branches or ()
        picked = [known.index(branch) for branch in branches_of(context, self.plan.guidance_scale)]
        shape = [1] * velocity.ndim
        shape[self.architecture.channel_axis_of(velocity)] = -1

        def place(array: Any) -> torch.Tensor:
            table = torch.as_tensor(array[:, picked]).to(velocity.device, torch.float32)
            return table.reshape(len(array), len(picked), *shape)

        return place(rect.gain), place(rect.offset)
