"""What a method measures on calibration prompts before it runs, and keeps for the next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from erta.online import Call, OnlineRule, online
from erta.pipeline import latent_call
from experiments.harness.calibrations import CALIBRATION_SEED, prompts_for
from experiments.models.call import call_kwargs
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


def record(cfg: DictConfig, pipe: Any, recorder: Callable[[], Seen], num_prompts: int) -> list[Seen]:
    """Uncached runs on the first calibration prompts at `cache.site`, one recorder each."""
    prompts, recorders = prompts_for(cfg, pipe)[:num_prompts], []
    with progress_bar() as bar:
        for index, prompt in enumerate(bar.track(prompts, description=f"{cfg.cache.name}: uncached runs")):
            recorders.append(recorder())
            with online(pipe, recorders[-1], cfg.cache.site):
                try:
                    pipe(**latent_call(prompt, CALIBRATION_SEED + index, call_kwargs(cfg)))
                finally:
                    recorders[-1].close()
    return recorders
