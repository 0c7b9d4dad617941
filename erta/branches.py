"""For solvers that tell the guidance branches apart: what the scheduler does not see is noted at the transformer.

A scheduler is given the guided output alone, `u + s (c - u)`. With the *contrast* c - u beside it a rule can weigh both branches
on its own. Where a pipeline does not name its branches, the contrast is the first less the second: so a fit is for the kind of
pipeline that it was made with. The transformer's outputs are looked at, in calls of this pipeline object only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from erta.errors import ErtaError, InstallError
from erta.fitted_scheduler import FittedScheduler
from erta.guidance import branches_of, combining_scale_of, known_pair, samples_of, split
from erta.hooks import BranchHook, Forward, HookedSession
from erta.pipeline import check_bare, find_denoisers, leaving
from erta.site import Site, make_site
from erta.trace import UncheckedTrace

Outputs = dict[str, torch.Tensor]  # of the present step, by cache context


@contextmanager
def branches_apart(pipe: Any) -> Iterator[None]:
    """Calls of `pipe` inside the `with` show a solver that was fitted with `branches="apart"` both guidance branches.

        pipe.scheduler = erta.fit(pipe, trajectories, steps=12, options=erta.FitOptions(branches="apart"))
        with erta.branches_apart(pipe):
            frames = pipe(prompt, num_inference_steps=12).frames

    Raises InstallError if a cache is on this pipeline already, or its scheduler is not such a solver; ErtaError in a call
    without two guidance branches.
    """
    check_bare(pipe)
    _check_scheduler(pipe.scheduler)
    seen: Outputs = {}

    def scheduler() -> Any:
        return session.scheduler

    hooks = {
        stage: _NotingHook(seen, make_site("output", transformer), scheduler)
        for stage, transformer in find_denoisers(pipe).items()
    }
    session = _ApartSession(pipe, hooks, seen)
    session.put_on(pipe)
    with leaving(lambda: session.take_off(pipe)):
        yield


class _NotingHook(BranchHook):
    """Runs the transformer as it is and notes its output until the scheduler's step."""

    def __init__(self, seen: Outputs, site: Site, scheduler: Callable[[], Any]) -> None:
        super().__init__(site, scheduler)
        self.seen = seen

    def answer(
        self, module: nn.Module, forward: Forward, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        _, branch = self.place(context, self.site.latent(args, kwargs))
        output = forward(*args, **kwargs)
        self.seen[branch] = self.site.velocity_of(output, args, kwargs)
        return output


class _ApartSession(HookedSession[_NotingHook]):
    """Gives the scheduler of a call the contrast of its branches."""

    def __init__(self, pipe: Any, hooks: dict[int, _NotingHook], seen: Outputs) -> None:
        super().__init__(pipe, pipe.scheduler, UncheckedTrace(), hooks)
        self.seen, self.scale = seen, None  # type: Outputs, float | None

    def before_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """See `HookedSession`."""
        super().before_call(pipe, arguments)
        self.scale = combining_scale_of(arguments)
        for hook in self.hooks.values():
            hook.samples = samples_of(arguments)

    def scheduler_of_call(self, own: Any) -> Any:
        """See `HookedSession`."""
        _check_scheduler(own)
        scheduler = copy.copy(own)
        scheduler.contrast_of = self._contrast
        return scheduler

    def after_call(self) -> None:
        """See `Session`."""
        super().after_call()
        self.seen.clear()

    def _contrast(self) -> torch.Tensor:
        """One branch less the other, of the present step."""
        parts: Outputs = {}
        for context, value in self.seen.items():
            parts |= split(value, branches_of(context, self.scale))
        self.seen.clear()
        if len(parts) != 2:
            raise ErtaError(
                f"this solver tells two guidance branches apart, and this step had {len(parts) or 'none'} "
                f"({', '.join(parts) or 'the transformer was not run'}): give a guidance that runs two "
                "(true_cfg_scale and a negative prompt on FLUX), or fit with branches='together'"
            )
        order = known_pair(parts) or tuple(parts)
        first, second = (parts[name].detach().float() for name in order)
        return first - second


def _check_scheduler(scheduler: Any) -> None:
    if not isinstance(scheduler, FittedScheduler) or scheduler.solver.contrast is None:
        raise InstallError(
            "branches_apart is for a solver that was fitted with branches='apart': set pipe.scheduler to it first"
        )
