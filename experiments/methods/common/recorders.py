"""Uncached runs on calibration prompts, with a recorder that looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from erta.online import Call, OnlineRule, online
from erta.pipeline import latent_call
from experiments.harness.calibrations import CALIBRATION_SEED
from experiments.harness.setup import Setup
from experiments.output.console import progress_bar


class Recorder(OnlineRule):
    """Computes every step, and looks."""

    def begin(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def should_compute(self, call: Call) -> bool:
        return True

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        """To be overridden: what is noted of a step."""
        raise NotImplementedError

    def close(self) -> None:
        """Called after the run: take off what was put on."""


Seen = TypeVar("Seen", bound=Recorder)


def record(setup: Setup, recorder: Callable[[], Seen], num_prompts: int) -> list[Seen]:
    """Uncached runs on the first calibration prompts at `cache.site`, one recorder each."""
    pipe, prompts, recorders = setup.pipe, setup.calibration_prompts[:num_prompts], []
    with progress_bar() as bar:
        for index, prompt in enumerate(bar.track(prompts, description=f"{setup.cfg.cache.name}: uncached runs")):
            recorders.append(recorder())
            with online(pipe, recorders[-1], setup.cfg.cache.site):
                try:
                    pipe(**latent_call(prompt, CALIBRATION_SEED + index, setup.kwargs))
                finally:
                    recorders[-1].close()
    return recorders
