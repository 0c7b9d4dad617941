"""Caches that decide while they run: a rule says at each step whether the transformer is run, no plan does.

The hook, the sites, the trace and the way on and off a pipeline are those of planned caches. What is different:
the number of forwards depends on the prompt, and every decision waits for the device.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from erta.errors import ExecutionMismatch
from erta.hooks import CachingHook, Forward, HookedSession
from erta.pipeline import check_bare, find_denoisers, leaving, single_denoiser
from erta.scheduler import counting, first_index
from erta.site import Site, make_site
from erta.trace import NOTHING_RECEIVED, CallTrace


@dataclass(frozen=True)
class Call:
    """One call of the transformer, as a rule sees it.

    Attributes:
        step: place in the scheduler's grid, 0 … num_steps - 1.
        branch: the pipeline's cache context: a guidance branch, or both in one batch.
        x: the latent (or packed tokens) that the transformer is given.
        transformer, args, kwargs: what would be called, for rules that look at an inner signal.
        forward: the transformer's own forward, below the hook, for rules that run it (or a part of it) themselves.
    """

    step: int
    num_steps: int
    branch: str
    x: torch.Tensor
    transformer: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    forward: Callable[..., Any] | None = None

    @property
    def is_last(self) -> bool:
        return self.step == self.num_steps - 1


class OnlineRule(ABC):
    """Decides step by step. A rule knows no model; what it keeps of a run it forgets in `begin`.

    It is asked once for every guidance branch at every step, in the pipeline's order; a rule that decides for all
    branches at once remembers what it told the first. The first step of every branch is computed without asking.
    """

    @abstractmethod
    def begin(self, num_steps: int) -> None:
        """Forget the last call. Raises ErtaError if the rule's constants are for another number of steps."""

    @abstractmethod
    def should_compute(self, call: Call) -> bool:
        """Whether the transformer is to be run."""

    @abstractmethod
    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        """The transformer was run: its output, and the residual that the site keeps of it."""

    def stand_in(self, call: Call, kept: torch.Tensor) -> torch.Tensor:
        """What the site is given at a reused step: what it kept of the last computed one, unless a rule foretells it."""
        return kept


@dataclass
class OnlineTrace(CallTrace):
    """The trace of a run whose steps were decided while it ran. What `rule` keeps counts as cache."""

    num_steps: int = 0
    rule: OnlineRule | None = None

    def finish(self, interrupted: bool = False) -> None:
        """Check that every branch saw every step once, in order, and weigh the cache and what the rule kept.

        Of an interrupted call, every step that it got to. Raises ExecutionMismatch.
        """
        self.interrupted = interrupted and (not self.executed or self.num_executed < self.num_steps)
        if not self.executed and not self.interrupted:
            raise ExecutionMismatch(NOTHING_RECEIVED)
        wanted = list(range(self.num_executed if self.interrupted else self.num_steps))
        for branch, steps in self.executed.items():
            if [step for step, _ in steps] != wanted:
                raise ExecutionMismatch(
                    f"branch {branch!r} was called at {len(steps)} steps, not once at each of {self.num_steps}. Was "
                    "guidance switched off on the way, or the cache put under another hook?"
                )
        self.weigh([*self.cached.values(), *tensors_in({} if self.rule is None else vars(self.rule))])

    def summary(self) -> str:
        """One line for people: computed steps by branch, seconds, cache bytes; loud if nothing was reused."""
        if self.interrupted:
            return f"interrupted after {self.num_executed} of {self.num_steps} steps"
        if not self.reused_anything():
            return f"did not reuse anything: all {self.num_steps} steps were computed in every branch"
        branches = ", ".join(f"{branch}: {count:g}" for branch, count in sorted(self.forwards.items()))
        return (
            f"forwards {branches}, of {self.num_steps} steps; {self.forward_s:.3f} s in the transformer, "
            f"{1000 * self.overhead_s:.2f} ms in the hook; cache {self.cache_bytes} bytes ({self.cache_dtype})"
        )


class OnlineHook(CachingHook):
    """Runs the transformer where the rule wants it, and answers elsewhere with the last residual."""

    trace: OnlineTrace

    def __init__(
        self,
        rule: OnlineRule,
        trace: OnlineTrace,
        site: Site,
        scheduler: Callable[[], Any],
    ) -> None:
        super().__init__(trace, site, scheduler)
        self.rule = rule

    def answer(
        self, module: nn.Module, forward: Forward, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        entered = time.perf_counter()
        if not self.trace.executed:
            scheduler = self.scheduler()
            self.trace.num_steps = len(scheduler.timesteps) - first_index(scheduler)
            self.rule.begin(self.trace.num_steps)
        x = self.site.latent(args, kwargs)
        step, branch = self.place(context, x)
        call = Call(step, self.trace.num_steps, branch, x.detach(), module, args, kwargs, forward)
        kept = self.kept.get(branch)
        if kept is None or self.rule.should_compute(call):
            output, kept = self.site.compute(self._timed(forward, x.device), args, kwargs)
            self._keep(branch, output, kept, (args, kwargs))
            self.rule.computed(call, self.site.parts(output, args, kwargs).velocity.detach(), kept.detach())
            self.trace.computed(call.branch, call.step, kept, time.perf_counter() - entered - self.inside_s)
            return output
        velocity = self.site.predict(forward, args, kwargs, self.rule.stand_in(call, kept))
        self.trace.reused(call.branch, call.step, time.perf_counter() - entered)
        return self.site.answer(velocity, self.beside.get(branch), args, kwargs)


@contextmanager
def online(
    pipe: Any,
    rule: OnlineRule,
    site: str | Callable[[nn.Module], Site] = "output",
    reuse: str = "residual",
    reuse_share: float = 0.0,
) -> Iterator[OnlineTrace]:
    """Run `pipe` under an online rule inside the `with`; afterwards, or after an exception, it is as before.

    Args:
        site, reuse: what is kept of a computed step and returned at a reused one (see `erta.site`), or what makes
            the site of a transformer, for rules with one of their own.
        reuse_share: what part of a forward the rule runs at a reused step.

    Yields the trace of the last call. A call that reused nothing says so in `trace.summary()`; it is no error,
    since some prompts may need every step.

    Raises:
        InstallError: a cache is installed already, or the pipeline has two transformers.
        ExecutionMismatch: a call did not pass through the hook once a step and branch.
    """
    check_bare(pipe)
    transformer, trace = single_denoiser(pipe), OnlineTrace(reuse_share=reuse_share, rule=rule)

    def scheduler() -> Any:
        return session.scheduler

    place = make_site(site, transformer, reuse) if isinstance(site, str) else site(transformer)
    hook = OnlineHook(rule, trace, place, scheduler)
    session = HookedSession(pipe, counting(pipe.scheduler), trace, dict.fromkeys(find_denoisers(pipe), hook))
    session.put_on(pipe)
    with leaving(lambda: session.take_off(pipe)):
        yield trace


def mean_change(now: torch.Tensor, before: torch.Tensor) -> float:
    """`mean |now - before|`, in float32."""
    return (now.float() - before.float()).abs().mean().item()


def relative_change(now: torch.Tensor, before: torch.Tensor) -> float:
    """`mean |now - before| / mean |before|`; 0 if nothing changed, infinite if there was nothing before."""
    change, size = mean_change(now, before), before.float().abs().mean().item()
    if size == 0:
        return float("inf") if change else 0.0
    return change / size


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries, lists, tuples and states of diffusers' hooks: what a cache keeps."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)
    elif type(value).__name__.endswith("State"):
        yield from tensors_in(vars(value))
