"""Several calls of one pipeline, step by step beside each other: what the solver does at a node may depend on all of them.

Each call runs in a thread of its own, but only one of them at any time: a call goes on until its scheduler is asked for the
next latent, and then the next call has its turn. So forwards are not run at once, and memory is that of one call and the
latents of the others.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from erta.branches import branches_apart
from erta.errors import ErtaError
from erta.fitted_scheduler import FittedScheduler


@dataclass(frozen=True)
class Asked:
    """A call waits at a node: its guided output and its latent there, and the contrast of its branches or None, (batch, …)."""

    output: torch.Tensor
    latent: torch.Tensor
    contrast: torch.Tensor | None = None


Answer = Callable[[int, list[Asked]], list[torch.Tensor]]


class _Stopped(BaseException):
    """Ends a call that waits for an answer that will not come; no `except Exception` on the way holds it up."""


class _Asking(FittedScheduler):
    """Hands every step over to whoever runs the calls."""

    ask: Callable[[Asked], torch.Tensor]

    def _next(self, k: int, *present: torch.Tensor) -> torch.Tensor:
        return self.ask(Asked(*present))


class _Call(threading.Thread):
    """One call of a pipeline, which runs only inside `go_on`."""

    def __init__(self, pipe: Any, scheduler: FittedScheduler, kwargs: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.pipe, self.kwargs = copy.copy(pipe), kwargs  # modules are shared, what a call notes on its pipeline is not
        asking = copy.copy(scheduler)
        asking.__class__ = _Asking
        asking.ask = self._ask  # type: ignore[attr-defined]
        self.pipe.scheduler = asking
        self.pipe.set_progress_bar_config(disable=True)
        self.said: SimpleQueue[Any] = SimpleQueue()
        self.heard: SimpleQueue[Any] = SimpleQueue()

    def go_on(self, answer: torch.Tensor | None) -> Any:
        """Start or answer; gives what the call asks next, or what it returns. Raises what the call raises."""
        if answer is None:
            self.start()
        else:
            self.heard.put(answer)
        said = self.said.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def stop(self) -> None:
        """End a call that waits, and wait for its thread."""
        if self.is_alive():
            self.heard.put(_Stopped())
            self.join()

    def run(self) -> None:
        """The thread's own; see `go_on`."""
        apart = self.pipe.scheduler.solver.contrast is not None
        try:
            with branches_apart(self.pipe) if apart else nullcontext():
                made = self.pipe(**self.kwargs)
            self.said.put(made)
        except _Stopped:
            pass
        except BaseException as error:
            self.said.put(error)

    def _ask(self, asked: Asked) -> torch.Tensor:
        self.said.put(asked)
        heard = self.heard.get()
        if isinstance(heard, BaseException):
            raise heard
        return heard


def run_in_step(pipe: Any, scheduler: FittedScheduler, calls: list[dict[str, Any]], answer: Answer) -> list[Any]:
    """What the calls of `pipe` return, each step of all of them answered at once.

    Args:
        scheduler: its nodes are the steps; its coefficients are not used.
        calls: the arguments of each call, `num_inference_steps` among them.
        answer: from the number of the node and what the calls ask there to their next latents.

    Raises what a call or `answer` raises, after every other call was ended; ErtaError if the calls do not keep step.
    """
    threads = [_Call(pipe, scheduler, kwargs) for kwargs in calls]
    answers: list[Any] = [None] * len(threads)
    try:
        for node in range(scheduler.solver.num_steps):
            said = [thread.go_on(latent) for thread, latent in zip(threads, answers, strict=True)]
            if not all(isinstance(one, Asked) for one in said):
                raise ErtaError(
                    f"the pipeline ended at step {node} of {scheduler.solver.num_steps}: a fit needs whole runs"
                )
            answers = answer(node, said)
        return [thread.go_on(latent) for thread, latent in zip(threads, answers, strict=True)]
    finally:
        for thread in threads:
            thread.stop()
