"""What a method measures on calibration prompts before it runs, and keeps for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from erta.online import Call, OnlineRule, online
from erta.session import latent_call
from experiments.calibrating import CALIBRATION_SEED, MADE_HERE, expected_signature, progress_bar, prompts_for
from experiments.models import call_kwargs
from experiments.record import read_json, write_json


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


COUNTED = 2  # raised when forwards are counted, or modules chosen, in another way: what was kept before is made anew
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


_SPENT: ContextVar[dict[str, float] | None] = ContextVar("seconds of what is kept", default=None)


@contextmanager
def search_seconds() -> Iterator[dict[str, float]]:
    """By name, the seconds that everything took which `kept` gives inside the `with`, also if an earlier run made it."""
    spent: dict[str, float] = {}
    token = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(token)


def kept(cfg: DictConfig, pipe: Any, name: str, setup: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`make()`, or what an earlier run made for the same model, grid, guidance, size, calibration prompts and `setup`."""
    size = [cfg.model.height, cfg.model.width, cfg.model.num_frames, cfg.model.max_sequence_length]
    made_for = [expected_signature(cfg, pipe), size, prompts_for(cfg, pipe), setup, COUNTED]
    digest = hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:10]
    path = MADE_HERE / f"{cfg.model.name}-{name}-{digest}.json"
    found: dict[str, Any] | None = read_json(path)
    if found is None or "made" not in found:
        started = time.perf_counter()
        made = make()
        found = {"seconds": time.perf_counter() - started, "made": made}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    if (spent := _SPENT.get()) is not None:
        spent[path.name] = found["seconds"]
    return found["made"]
