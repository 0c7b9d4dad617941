"""One generation, timed the same way with and without a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from erta.pipeline import find_denoisers
from erta.trace import CallTrace, Stopwatch

PutOn = Callable[[Any], AbstractContextManager[CallTrace | None]]


@dataclass(frozen=True)
class Sample:
    """A clip (frames, height, width, 3) in [0, 1] before any encoding, an image has one frame, and what it took.

    `denoise_s` runs from the first transformer call to the end of the last scheduler step, `pipeline_s` over
    the whole call, both synchronised. `forwards` counts transformer forwards over all guidance branches (a fraction
    where a cache leaves parts of a forward out). `mask` says which steps were computed, in the guidance branch that
    runs first; None without a cache.
    """

    frames: np.ndarray
    denoise_s: float
    pipeline_s: float
    forward_s: float
    forwards: float
    overhead_s: float = 0.0
    overhead_calls: int = 0
    cache_bytes: int = 0
    cache_dtype: str = ""
    mask: tuple[bool, ...] | None = None


def generate(
    pipe: Any, prompt: str, seed: int, kwargs: dict[str, Any], put_on: PutOn = lambda pipe: nullcontext()
) -> Sample:
    """Generate one clip from the noise of a CPU generator, under what `put_on` puts on the pipeline (`Arm.put_on`)."""
    clock = _DenoiseClock(pipe._execution_device)
    with put_on(pipe) as trace:
        handles = []
        for transformer in find_denoisers(pipe).values():
            handles.append(transformer.register_forward_pre_hook(clock.forward_starts))
            handles.append(transformer.register_forward_hook(clock.forward_ends))
        try:
            started = now()
            made = pipe(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
                callback_on_step_end=clock.step_ends,
                **kwargs,
            )
            pipeline_s = now() - started
        finally:
            for handle in handles:
                handle.remove()
    return Sample(
        frames=np.asarray(made.frames[0] if hasattr(made, "frames") else made.images, dtype=np.float32),
        denoise_s=clock.last_step_end - clock.first_forward_start,
        pipeline_s=pipeline_s,
        forward_s=trace.forward_s if trace is not None else clock.forwards.seconds,
        forwards=sum(trace.forwards.values()) if trace is not None else clock.forwards.count,
        overhead_s=trace.overhead_s if trace is not None else 0.0,
        overhead_calls=sum(map(len, trace.executed.values())) if trace is not None else 0,
        cache_bytes=trace.cache_bytes if trace is not None else 0,
        cache_dtype=trace.cache_dtype if trace is not None else "",
        mask=tuple(computed for _, computed in next(iter(trace.executed.values()))) if trace is not None else None,
    )


def needed_s(denoise_s: float, forward_s: float, overhead_s: float, solver_s: float) -> float:
    """What a cached generation needs of its own denoising: its forwards, and a solver that is no slower than the uncached one.

    Never more than `denoise_s`, so uncached seconds over it bound the speed-up that was measured: the rest is the hook, and steps
    that are slower than uncached ones.

    Args:
        denoise_s, forward_s, overhead_s: of the cached generation: all of it, inside the transformer, inside the hook.
        solver_s: of as many steps of the uncached one, beside its forwards.
    """
    return forward_s + min(solver_s, max(denoise_s - forward_s - overhead_s, 0.0))


class _DenoiseClock:
    """Notes the first forward's start and every step's end; synchronises only at those two points of a call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device  # where forwards run; under offload the weights are elsewhere when one begins
        self.first_forward_start = self.last_step_end = 0.0
        self.forwards = Stopwatch()

    def forward_starts(self, transformer: nn.Module, *_: Any) -> None:
        if self.forwards.count == 0:
            self.first_forward_start = now()
        self.forwards.start(self.device)

    def forward_ends(self, *_: Any) -> None:
        self.forwards.stop()

    def step_ends(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == pipe.num_timesteps:
            self.last_step_end = now()
        return {}


def now() -> float:
    """Seconds, after everything that the device was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
