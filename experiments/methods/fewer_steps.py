"""Fewer steps without a cache, with the same solver or another one; and the uncached run a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from erta.errors import choice_index
from experiments.harness.arm import Arm
from experiments.harness.config import CONF
from experiments.harness.setup import Setup
from experiments.methods.common.solvers import scheduler_arm
from experiments.models.load import set_sampler

SAMPLERS = CONF / "sampler"


def no_cache(setup: Setup) -> Arm:
    """The uncached run a second time: the noise floor of every metric."""
    return Arm(None, setup.kwargs)


def arm(setup: Setup) -> Arm:
    """The pipeline itself at as many steps as the budget has forwards: a baseline of ours, which few papers show.

    Site: none. Stored: nothing. Static. Where we differ: nowhere, it is what a user does without a cache.
    `cache.options.sampler` names another solver (of the group `sampler`) for this side alone: the uncached run that
    it is compared with keeps `sampler=`.
    """
    kwargs = {**setup.kwargs, "num_inference_steps": setup.step_count()}
    name = setup.cfg.cache.options.get("sampler")
    if name is None:
        return Arm(None, kwargs)
    choice_index("cache.options.sampler", name, tuple(sorted(path.stem for path in SAMPLERS.glob("*.yaml"))))
    return scheduler_arm(setup, scheduler_named(setup, name), kwargs["num_inference_steps"], {"sampler": name})


def scheduler_named(setup: Setup, sampler: str) -> Any:
    """The solver of the group `sampler` with the model's shift, as it would stand on the pipeline. Raises what `set_sampler` does."""
    other = OmegaConf.create({"model": setup.cfg.model, "sampler": OmegaConf.load(SAMPLERS / f"{sampler}.yaml")})
    swapped = SimpleNamespace(scheduler=setup.pipe.scheduler)
    set_sampler(swapped, other)
    return swapped.scheduler


@contextmanager
def running_under(setup: Setup, sampler: str) -> Iterator[None]:
    """The pipeline with another solver of the group `sampler` within the `with`."""
    own, setup.pipe.scheduler = setup.pipe.scheduler, scheduler_named(setup, sampler)
    try:
        yield
    finally:
        setup.pipe.scheduler = own
