"""One training loop for every part of the embedded models: seeded, resumable, with a curve and a progress bar.

Step k draws its batch and its noise from generators seeded by (seed, k), so a run that was interrupted and
continued sees the batches that an uninterrupted one would have seen. On a GPU other
processes render batches ahead.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from erta.errors import ErtaError

LOG_EVERY_S = 60.0  # where there is no terminal for a progress bar
NO_END = 10**9  # steps
DRAWN_AHEAD = 2  # batches by each process; they wait in shared memory, which a container may have little of
MOST_DRAWING = 5  # processes
LOOK_EVERY = 20  # steps between two looks at the loss: each makes the device wait
Losses = tuple[torch.Tensor, dict[str, float | torch.Tensor]]


@dataclass(frozen=True)
class StageSettings:
    """How one part is trained. `sample_every_s` and `checkpoint_every_s` are in seconds of wall time."""

    name: str
    steps: int
    learning_rate: float
    warmup_steps: int = 100
    decay_share: float = 1.0  # share of the steps, at the end, over which the learning rate falls to zero
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_every_s: float = 60.0
    sample_every_s: float = 600.0
    minutes: float | None = None  # of training, restarts included, after which it has ended

    def share_done(self, step: int, seconds: float) -> float:
        """How much of the training is behind, in [0, 1]: by steps, or by time where that is nearer to its end."""
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(max(step / self.steps, by_time), 1.0)

    def learning_rate_factor(self, step: int, seconds: float = 0.0) -> float:
        """Linear warm-up, constant, then half a cosine to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = (self.share_done(step, seconds) - (1 - self.decay_share)) / max(self.decay_share, 1e-9)
        return warm if progress <= 0 else warm * 0.5 * (1 + math.cos(math.pi * progress))


def with_end(settings: StageSettings, steps: int | None, minutes: float | None) -> StageSettings:
    """The settings with another end, if one is given: after so many steps, or so many minutes, whichever comes first."""
    return replace(settings, steps=steps or (NO_END if minutes else settings.steps), minutes=minutes)


def training_device(name: str | None) -> torch.device:
    """Where to train: what is asked for, or a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ErtaError(f"train_tiny.device must be cpu, cuda or cuda:N, not {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ErtaError(f"train_tiny.device={name}: this machine shows no CUDA device")
    return device


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model compiled for training; on a GPU as a CUDA graph, since a small model's kernels start slower than run."""
    if next(model.parameters()).device.type != "cuda":
        return torch.compile(model)
    torch.set_float32_matmul_precision("high")
    return torch.compile(model, mode="reduce-overhead")


class _Draws(Dataset):
    """What each step is given, drawn from a generator of its own."""

    def __init__(self, draw: Callable[[int, np.random.Generator], Any], seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __getitem__(self, step: int) -> Any:
        return self.draw(step, np.random.default_rng([self.seed, step]))


def drawing_processes(device: torch.device | str) -> int:
    """How many processes draw batches ahead: none beside a model that trains on the same cores."""
    if torch.device(device).type == "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    return min(MOST_DRAWING, max(1, (os.cpu_count() or 1) - 1))


class Trainer:
    """Trains `model` by `loss_fn(step, drawn)`, keeps a moving average of its weights, and can be continued.

    `drawn` is what `draw(step, rng)` gives; without `draw` it is the step's generator itself. After `run`, the model holds the
    averaged weights. The folder holds `checkpoint.safetensors` (weights, average, optimizer state, step, seconds),
    `curve.jsonl` and whatever `on_sample(step)` writes.
    """

    def __init__(
        self,
        settings: StageSettings,
        model: nn.Module,
        loss_fn: Callable[[int, Any], Losses],
        optimizers: list[torch.optim.Optimizer],
        folder: Path,
        on_sample: Callable[[int], None] | None = None,
        draw: Callable[[int, np.random.Generator], Any] | None = None,
    ) -> None:
        self.settings, self.model, self.loss_fn = settings, model, loss_fn
        self.optimizers, self.folder, self.on_sample = optimizers, Path(folder), on_sample
        self.folder.mkdir(parents=True, exist_ok=True)
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        self.base_rates = [[group["lr"] for group in opt.param_groups] for opt in optimizers]
        self.step, self.seconds = 0, 0.0
        self.draws = _Draws(draw or (lambda step, rng: rng), settings.seed)
        self.processes = drawing_processes(next(model.parameters()).device) if draw else 0

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def run(self, until_step: int | None = None) -> nn.Module:
        """Train to the end (or to `until_step`), continuing from the checkpoint if there is one."""
        if self.checkpoint_path.exists():
            self._load()
        last = min(until_step or self.settings.steps, self.settings.steps)
        drawn = self._drawn(last) if self.step < last else iter(())
        checkpointed = sampled = logged = time.monotonic()
        shown = ""
        self.model.train()
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()]
        with Progress(*columns) as bar, open(self.folder / "curve.jsonl", "a") as curve:
            task = bar.add_task(self.settings.name, total=last if last < NO_END else None, completed=self.step)
            try:
                while self.step < last and self.settings.share_done(self.step, self.seconds) < 1:
                    began = time.monotonic()
                    losses = self._one_step(next(drawn))
                    if self.step % LOOK_EVERY == 0:
                        metrics = {name: float(value) for name, value in losses.items()}
                        curve.write(json.dumps({"step": self.step, **metrics}) + "\n")
                        curve.flush()
                        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
                        bar.update(task, completed=self.step, description=f"{self.settings.name}  {shown}")
                    now = time.monotonic()
                    self.seconds += now - began
                    if not bar.console.is_terminal and now - logged > LOG_EVERY_S:
                        of = f" of {last}" if last < NO_END else ""
                        print(f"{self.settings.name}  step {self.step}{of}  {shown}", flush=True)
                        logged = now
                    if now - checkpointed > self.settings.checkpoint_every_s:
                        self._save()
                        checkpointed = now
                    if self.on_sample and now - sampled > self.settings.sample_every_s:
                        self._sample(self.on_sample)
                        sampled = time.monotonic()
            finally:
                self._save()
        self._swap()
        self.model.eval()
        return self.model

    def _drawn(self, last: int) -> Iterator[Any]:
        """What the steps from here on are given, drawn ahead where processes are at hand."""
        return iter(
            DataLoader(
                self.draws,
                batch_size=None,
                sampler=range(self.step, last),
                collate_fn=lambda drawn: drawn,
                num_workers=self.processes,
                multiprocessing_context="fork" if self.processes else None,
                prefetch_factor=DRAWN_AHEAD if self.processes else None,
                generator=torch.Generator(),  # the loader draws a seed: not from the global generator
            )
        )

    def _one_step(self, drawn: Any) -> dict[str, float | torch.Tensor]:
        factor = self.settings.learning_rate_factor(self.step, self.seconds)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        loss, metrics = self.loss_fn(self.step, drawn)
        if self.step % LOOK_EVERY == 0 and not torch.isfinite(loss):
            raise FloatingPointError(f"{self.settings.name}: the loss is not finite at step {self.step}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), 1 - decay)
        return {"loss": loss.detach(), **metrics}

    def _sample(self, on_sample: Callable[[int], None]) -> None:
        self._swap()
        self.model.eval()
        try:
            on_sample(self.step)
        finally:
            self._swap()
            self.model.train()

    def _swap(self) -> None:
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.data, self.average[name] = self.average[name], parameter.data

    def _save(self) -> None:
        if not all(torch.isfinite(p.detach()).all() for p in self.named.values()):
            return  # the last checkpoint is the one to go on from
        tensors = {f"model.{name}": p.detach() for name, p in self.named.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items()}
        for k, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{index}.{key}": torch.as_tensor(v) for key, v in state.items()}
        partial = self.checkpoint_path.with_suffix(".partial")
        save_file(
            {name: t.contiguous() for name, t in tensors.items()},
            partial,
            {"step": str(self.step), "seconds": str(self.seconds)},
        )
        os.replace(partial, self.checkpoint_path)

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.checkpoint_path, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata().get("seconds", 0))
        tensors = load_file(self.checkpoint_path)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                parts = name.split(".")
                if parts[0] == "optimizer" and int(parts[1]) == k:
                    state.setdefault(int(parts[2]), {})[parts[3]] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
