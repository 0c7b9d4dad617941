"""What happens at a forward of a transformer: a plan is carried out, or an uncached run is looked at.

The step comes from the scheduler, the guidance branch from the pipeline's `cache_context`, or from what can be seen of a call
without one (see `erta.guidance`). How a forward gets here, and nobody else's, is the matter of `erta.attachment`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from erta.architectures import architecture_of
from erta.attachment import (
    Answers,
    attach,
    attach_again_if_dropped,
    check_free,
    check_weights_form,
    detach,
    weights_form,
)
from erta.coefficients import Coefficients
from erta.errors import ExecutionMismatch, InstallError, SignatureMismatch
from erta.guidance import branches_of, unnamed_context
from erta.pipeline import Session, find_denoisers, leaving
from erta.plan import Plan
from erta.scheduler import check_one_forward_a_step, counting, first_index, settle_start, step_index
from erta.site import BlocksSite, SeenForward, Site
from erta.trace import CallTrace, Stopwatch, Trace, UncheckedTrace

AnyHook = TypeVar("AnyHook", bound="BranchHook")
OnReuse = Callable[[int, str, torch.Tensor, Callable[[], torch.Tensor]], None]
Forward = Callable[..., Any]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class BranchHook(Answers):
    """What a session does at a forward of one transformer. Keeps something for each guidance branch."""

    branches: tuple[str, ...] | None = None  # that are planned
    samples: int | None = None  # that the call at hand makes, where that tells branches apart
    started: Callable[[], None]  # called at the first forward of every call

    def __init__(self, site: Site, scheduler: Callable[[], Any]) -> None:
        self.site, self.scheduler = site, scheduler
        self.kept: dict[str, torch.Tensor | None] = {}
        self.beside: dict[str, torch.Tensor | None] = {}
        self._step, self._place, self._begin = -1, 0, 0

    @property
    def exchanges_blocks(self) -> bool:  # type: ignore[override]
        return isinstance(self.site, BlocksSite)

    def reset(self) -> None:
        """See `Answers`."""
        self.kept.clear()
        self.beside.clear()
        self._step = -1

    def place(self, context: str | None, x: torch.Tensor) -> tuple[int, str]:
        """The step and the guidance branch of a forward. Raises what `unnamed_context` raises."""
        scheduler, before = self.scheduler(), self._step
        if before < 0:
            self.started()
            self._begin = first_index(scheduler)
        step = self._step = step_index(scheduler) - self._begin
        if context is not None:
            return step, context
        self._place = self._place + 1 if step == before else 0
        return step, unnamed_context(self._place, x.shape[0], self.samples, self.branches)


class CachingHook(BranchHook):
    """What hooks that leave forwards out have in common: a trace, and the clock around the transformer."""

    def __init__(self, trace: CallTrace, site: Site, scheduler: Callable[[], Any]) -> None:
        super().__init__(site, scheduler)
        self.trace = trace
        self.inside_s = 0.0  # of the last forward, as the CPU sees it

    def _timed(self, forward: Forward, device: torch.device) -> Forward:
        """The transformer's forward alone on the trace's clock; what the site does around it is the hook's time."""
        return _Timed(self, forward, device)

    def _keep(self, branch: str, output: Any, kept: torch.Tensor | None, call: _Arguments) -> None:
        """Keep of a computed step what reused ones need, nothing where `kept` is None, and note it."""
        self.kept[branch] = kept
        if self.site.architecture.beside_velocity is None:
            return
        beside = self.beside[branch] = None if kept is None else self.site.parts(output, *call).beside
        if beside is not None:
            self.trace.cached[f"{branch}, beside"] = beside


class _Timed:
    """See `CachingHook._timed`."""

    __slots__ = ("device", "forward", "hook")

    def __init__(self, hook: CachingHook, forward: Forward, device: torch.device) -> None:
        self.hook, self.forward, self.device = hook, forward, device

    def around(self, forward: Forward) -> _Timed:
        """The same clock around another forward."""
        return _Timed(self.hook, forward, self.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        called, clock = time.perf_counter(), self.hook.trace.transformer
        clock.start(self.device)
        output = self.forward(*args, **kwargs)
        clock.stop()
        self.hook.inside_s = time.perf_counter() - called
        return output


class CacheHook(CachingHook):
    """Runs the transformer at computed steps; at reused ones predicts from the last residual, rectified if planned.

    A residual is kept only where the next step reuses it.

    `on_reuse(step, context, v_cached, true_velocity)`, if set, sees every prediction before rectification, and
    can run the transformer for what it stands in for: for diagnosis, since that costs what the cache saves.

    `stage` is 1 on a pipeline's second transformer, else 0. Each transformer has a hook and a state of its own;
    `replaces` is the hook of the one that ran before, whose residuals are freed as soon as this one computes.
    """

    trace: Trace

    def __init__(
        self,
        plan: Plan,
        trace: Trace,
        site: Site,
        scheduler: Callable[[], Any],
        stage: int = 0,
        replaces: CacheHook | None = None,
    ) -> None:
        super().__init__(trace, site, scheduler)
        self.plan, self.stage, self.replaces = plan, stage, replaces
        self.branches = plan.branches
        self.planned: set[str] = set()  # cache contexts that the plan knows, as far as they were seen
        self.coefficients: Coefficients | None = None
        self.on_reuse: OnReuse | None = None

    def answer(
        self, module: nn.Module, forward: Forward, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        entered = time.perf_counter()
        x = self.site.latent(args, kwargs)
        step, branch = self.place(context, x)
        self._check(x, step, branch)
        self.trace.stages[step] = self.stage
        if self.plan.mask[step]:
            if self.replaces is not None:
                self.replaces.reset()
            output, residual = self.site.compute(self._timed(forward, x.device), args, kwargs)
            kept = residual if self.plan.is_reused(step + 1) else None
            self._keep(branch, output, kept, (args, kwargs))
            self.trace.computed(branch, step, kept, time.perf_counter() - entered - self.inside_s)
            return output
        kept = self.kept.get(branch)
        if kept is None:
            raise ExecutionMismatch(
                f"step {step} of branch {branch!r} is to be reused, but nothing was computed before"
            )
        velocity = self.site.predict(forward, args, kwargs, kept)
        if self.on_reuse is not None:
            self.on_reuse(
                step, branch, velocity, lambda: self.site.parts(forward(*args, **kwargs), args, kwargs).velocity
            )
        if self.coefficients is None:
            self.coefficients = Coefficients(self.plan, architecture_of(module))
        velocity = self.coefficients.rectify(velocity, step, branch)
        self.trace.reused(branch, step, time.perf_counter() - entered)
        return self.site.answer(velocity, self.beside.get(branch), args, kwargs)

    def _check(self, x: torch.Tensor, step: int, branch: str) -> None:
        plan = self.plan
        if step >= plan.num_steps:
            raise ExecutionMismatch(f"the scheduler is at step {step}, but the plan has {plan.num_steps} steps")
        if plan.takeover is not None and self.stage != int(step >= plan.takeover):
            runs = "first" if self.stage == 0 else "second"
            raise SignatureMismatch("takeover", f"step {plan.takeover}", f"another: step {step} is the {runs}'s")
        if plan.latent_shape is not None and tuple(x.shape[1:]) != plan.latent_shape:
            raise SignatureMismatch("latent_shape", plan.latent_shape, tuple(x.shape[1:]))
        if branch not in self.planned:
            if plan.branches is not None and not set(branches_of(branch, plan.guidance_scale)) <= set(plan.branches):
                raise SignatureMismatch("branches", plan.branches, branch)
            self.planned.add(branch)


Observer = Callable[[SeenForward], None]  # called once a forward, in order of the steps


class ObserverHook(BranchHook):
    """Runs the transformer as it is, and shows an observer every output and what a cache would have made of it."""

    samples = 1

    def __init__(self, observer: Observer, site: Site, scheduler: Callable[[], Any], stage: int = 0) -> None:
        super().__init__(site, scheduler)
        self.observer, self.stage = observer, stage
        self.transformer = Stopwatch()

    def answer(
        self, module: nn.Module, forward: Forward, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = self.site.latent(args, kwargs).detach()
        step, branch = self.place(context, x)
        self.transformer.start(x.device)
        output, kept = self.site.compute(forward, args, kwargs)
        self.transformer.stop()

        def predict(earlier: torch.Tensor) -> torch.Tensor:
            return self.site.predict(forward, args, kwargs, earlier).detach()

        velocity = self.site.parts(output, args, kwargs).velocity.detach()
        self.observer(SeenForward(step, branch, x, velocity, kept.detach(), predict, self.stage))
        return output


class HookedSession(Session, Generic[AnyHook]):
    """A session that answers, or watches, the forwards of each transformer, by stage."""

    def __init__(self, pipe: Any, scheduler: Any, trace: CallTrace, hooks: Mapping[int, AnyHook]) -> None:
        super().__init__(pipe, scheduler, trace)
        self.transformers, self.hooks = find_denoisers(pipe), hooks
        self.weights = {stage: weights_form(transformer) for stage, transformer in self.transformers.items()}
        for hook in hooks.values():
            hook.started = self.first_forward

    def put_on(self, pipe: Any) -> None:
        """Hooks first: if one is refused, the pipeline is as it was."""
        done: list[nn.Module] = []
        try:
            for stage, transformer in self.transformers.items():
                attach(transformer, self, self.hooks[stage])
                done.append(transformer)
        except InstallError:
            for transformer in done:
                detach(transformer, self)
            raise
        super().put_on(pipe)

    def let_go(self) -> None:
        """See `Session`."""
        for transformer in self.transformers.values():
            detach(transformer, self)

    def before_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """Forget the last call, and look whether the transformers are still those that the hooks are on.

        The scheduler of the call is made of whatever the pipeline has now. Raises InstallError for a transformer that was
        exchanged, compiled whole, quantised, emptied, or got a cache of diffusers.
        """
        present = find_denoisers(pipe)
        for stage, transformer in self.transformers.items():
            now = present.get(stage)
            check_free(transformer if now is None else now)
            if now is not transformer:
                raise InstallError(
                    "the pipeline got another transformer since erta was installed: call erta.uninstall(pipe), then install "
                    "a plan that was made for it"
                )
            check_weights_form(transformer, self.weights[stage])
            attach_again_if_dropped(transformer)
        self.scheduler = self.scheduler_of_call(pipe.scheduler)
        for hook in self.hooks.values():
            hook.reset()

    def first_forward(self) -> None:
        """Now the scheduler has its grid. To be extended: raise ErtaError for one that does not do."""
        settle_start(self.scheduler, getattr(self.owner(), "_num_timesteps", None))

    def scheduler_of_call(self, own: Any) -> Any:
        """What a call runs with in place of the pipeline's own scheduler."""
        return counting(own)

    def after_call(self) -> None:
        """See `Session`."""
        for hook in self.hooks.values():
            hook.reset()


class ObservedSession(HookedSession[ObserverHook]):
    """The session of an uncached run that is looked at. `sigmas` is the grid that the last call ran, (num_steps + 1,)."""

    def __init__(self, pipe: Any, hooks: Mapping[int, ObserverHook]) -> None:
        super().__init__(pipe, pipe.scheduler, UncheckedTrace(), hooks)
        self._grid = np.empty(0)
        self.show_grid = self._note_grid

    def _note_grid(self, sigmas: np.ndarray) -> None:
        self._grid = sigmas

    @property
    def sigmas(self) -> np.ndarray:
        return self._grid[first_index(self.scheduler) :]

    def first_forward(self) -> None:
        """See `HookedSession`. Raises what `check_one_forward_a_step` raises."""
        super().first_forward()
        check_one_forward_a_step(self.scheduler, self.sigmas)


@contextmanager
def observed(pipe: Any, observer: Observer, site_of: Callable[[nn.Module], Site]) -> Iterator[ObservedSession]:
    """Calls of `pipe` inside the `with` are uncached and shown to `observer`. Raises what `attach` raises."""

    def scheduler() -> Any:
        return session.scheduler

    hooks = {
        stage: ObserverHook(observer, site_of(transformer), scheduler, stage)
        for stage, transformer in find_denoisers(pipe).items()
    }
    session = ObservedSession(pipe, hooks)
    session.put_on(pipe)
    with leaving(lambda: session.take_off(pipe)):
        yield session
