"""SmoothCache (Liu et al., 2024, arXiv 2411.10510): each component type is reused where it was seen to change little.

Site: the outputs of attention, cross-attention and feed-forward (in FLUX's single blocks both at once, as a third type). Stored: one output a module and guidance branch.
Static: a type is reused at a step iff its relative L1 change since its last computed step, measured along uncached runs
on calibration prompts and averaged over blocks and branches, is below `alpha`, at most 3 steps in a row. Norms,
modulation, embeddings and head always run, and so does every fourth step: `cache.steps` reaches no less than that.
Where we differ: 5 prompts in place of about 10 samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from erta.online import Call, relative_change
from erta.pipeline import single_denoiser
from erta.policy import threshold_mask
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number
from experiments.methods.common.modules import Schedule, components_of, module_arm, tensors
from experiments.methods.common.recorders import Recorder, record

PROMPTS, MAX_SKIP = 5, 3


def arm(setup: Setup) -> Arm:
    """SmoothCache at `cache.options.alpha`, or at the alpha that meets the budget."""
    modules = components_of(single_denoiser(setup.pipe))

    def measure() -> dict[str, Any]:
        def recorder() -> ChangeRecorder:
            return ChangeRecorder(modules)

        profiles = [one.profiles() for one in record(setup, recorder, PROMPTS)]
        return {kind: np.mean([profile[kind] for profile in profiles], axis=0).tolist() for kind in modules}

    profiles = kept(setup, "smoothcache", [PROMPTS, MAX_SKIP], measure)

    def schedule(alpha: float) -> Schedule:
        check_number("alpha", alpha, 0)
        return {kind: threshold_mask(np.array(profile), alpha) for kind, profile in profiles.items()}

    return module_arm(setup, Knob("alpha", 1e-5, 1e3), schedule)


class ChangeRecorder(Recorder):
    """Relative L1 change of every module's output over 1 … 3 steps, mean over the modules of a type and branches."""

    def __init__(self, modules: dict[str, list[nn.Module]]) -> None:
        self.modules = modules
        self.made: dict[tuple[str, int], tuple[torch.Tensor, ...]] = {}
        self.handles: list[Any] = []

    def begin(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.earlier: dict[tuple[str, str, int], list[tuple[torch.Tensor, ...]]] = {}
        self.changes: dict[tuple[str, int, int], list[float]] = {}
        for kind, modules in self.modules.items():
            for index, module in enumerate(modules):
                self.handles.append(module.register_forward_hook(self._keep(kind, index)))

    def _keep(self, kind: str, index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.made[kind, index] = tuple(tensor.detach() for tensor in tensors(output))

        return keep

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        for (kind, index), now in self.made.items():
            before = self.earlier.setdefault((call.branch, kind, index), [])
            for gap, then in enumerate(reversed(before), 1):
                change = float(np.mean([relative_change(a, b) for a, b in zip(now, then, strict=True)]))
                self.changes.setdefault((kind, call.step, gap), []).append(change)
            before.append(now)
            del before[:-MAX_SKIP]
        self.made.clear()

    def close(self) -> None:
        """Take the hooks off the modules."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def profiles(self) -> dict[str, np.ndarray]:
        """By type, (num_steps, 3): the change over 1, 2 and 3 steps; NaN before the first."""
        made = {kind: np.full((self.num_steps, MAX_SKIP), np.nan) for kind in self.modules}
        for (kind, step, gap), values in self.changes.items():
            made[kind][step, gap - 1] = np.mean(values)
        return made
