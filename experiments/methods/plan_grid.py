"""What a static method's choice of steps is worth without its cache: a baseline of ours, which no paper shows.

Site: none. Stored: nothing. Static: the same solver runs on nothing but the sigmas of the steps that the method computes, as
many forwards, no reuse. Where this does as well as the method, the method has found a grid, and caching adds nothing. Where
we differ: from the method, by its cache alone.
"""

from __future__ import annotations

from erta.errors import ErtaError
from experiments.harness import catalogue
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.searched import arm_of, plan_of


def arm(setup: Setup) -> Arm:
    """The grid of the method that `cache.options.of` names, at the same budget and site.

    Raises ErtaError for a method that chooses no whole steps beforehand.
    """
    name = setup.options[setup.cfg.cache.about.steps_of]
    try:
        about = catalogue.facts(name)
    except ErtaError as error:
        raise ErtaError(f"cache.options.of={name}: {error}") from error
    if not about.whole_steps:
        raise ErtaError(
            f"cache.options.of={name}: {name} does not choose beforehand which steps are computed whole: it decides while "
            "it runs, differently in each guidance branch, or leaves out parts of a forward, so that its whole steps "
            f"alone would not be its budget. Those that do: {', '.join(with_whole_steps())}"
        )
    made = arm_of(setup, name)
    plan = made.plan or plan_of(setup, tuple(map(bool, made.report["mask"])), {})
    grid = plan.grid_only()
    return Arm(
        grid, {**setup.kwargs, "num_inference_steps": grid.num_steps}, made.calibration, searched_s=made.searched_s
    )


def with_whole_steps() -> list[str]:
    """The methods that choose beforehand which steps are computed whole."""
    return [name for name in catalogue.names() if catalogue.facts(name).whole_steps]
