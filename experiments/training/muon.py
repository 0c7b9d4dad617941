"""Muon in float32 for matrices and convolution kernels.

torch.optim.Muon takes matrices only and orthogonalises in bfloat16, which a CPU without bfloat16 units runs
several times slower than float32: here that would cost more than the training step itself. Parameters of one shape
are orthogonalised together.
Source: Jordan et al., "Muon: an optimizer for hidden layers", with the AdamW-matched scale of Liu et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def orthogonalise(gradient: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrices to (…, rows, columns), by five Newton-Schulz iterations."""
    a, b, c = NS_COEFFICIENTS
    wide = gradient.shape[-2] <= gradient.shape[-1]
    x = gradient if wide else gradient.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; kernels (out, in, …) count as (out, in · …) matrices."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; the learning rate means what it means for AdamW (update RMS 0.2)."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                alike.setdefault(direction.shape, []).append((parameter, direction))
            for shape, pairs in alike.items():  # many small products cost a GPU more to start than to make
                updates = (
                    orthogonalise(torch.stack([direction for _, direction in pairs])) * 0.2 * math.sqrt(max(shape))
                )
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"])


def muon_and_adamw(
    model: nn.Module,
    is_inside: Callable[[str, nn.Parameter], bool],
    learning_rate: float,
    muon_decay: float = 0.0,
    adamw_decay: float = 0.0,
    **adamw: Any,
) -> list[torch.optim.Optimizer]:
    """Muon for the parameters that are inside, AdamW, with the options given, for the others; frozen ones are left out."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = [parameter for name, parameter in trained if is_inside(name, parameter)]
    others = [parameter for name, parameter in trained if not is_inside(name, parameter)]
    muon = Muon(inside, lr=learning_rate, weight_decay=muon_decay)
    return [muon, torch.optim.AdamW(others, **{"lr": learning_rate, "weight_decay": adamw_decay, **adamw})]
