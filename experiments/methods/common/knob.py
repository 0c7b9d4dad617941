"""Equal budgets for methods whose number of forwards follows from a parameter of their own.

Such a method has a knob: the more of it, the fewer forwards. Its value comes from the configuration, or it is
searched for so that runs on a few calibration prompts make as many forwards as the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from erta.errors import BudgetError, ErtaError
from erta.online import OnlineRule, online
from erta.pipeline import latent_call
from erta.trace import CallTrace
from experiments.harness.arm import Arm
from experiments.harness.calibrations import CALIBRATION_SEED
from experiments.harness.config import BUDGETS
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.output import console
from experiments.output.console import progress_bar

MAX_TRIES = 14
CLOSE_ENOUGH = 0.17  # of a step: no more values are tried
WITHIN = 0.5  # of a step: counts as the budget that was asked for
Attach = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Knob:
    """A method's own parameter: an option in its YAML file (null there: to be searched for).

    From `low` (nearly everything is computed) to `high` (as little as the method can), by factors, or in whole
    numbers if `whole`.
    """

    name: str
    low: float
    high: float
    whole: bool = False

    def between(self, low: float, high: float) -> float | None:
        """The value to try next, or None if there is none."""
        if self.whole:
            middle = (low + high) // 2
            return middle if low < middle < high else None
        return math.sqrt(low * high) if high / low > 1.0005 else None


def check_number(name: str, value: Any, least: float, whole: bool = False) -> Any:
    """An option's value; raises ErtaError if it is no number (or no whole one), or smaller than `least`."""
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or value < least:
        kind = "a whole number" if whole else "a number"
        raise ErtaError(f"cache.options.{name} must be {kind} ≥ {least:g}, not {value!r}")
    return value


def online_arm(setup: Setup, knob: Knob, make_rule: Callable[..., OnlineRule]) -> Arm:
    """A rule of ours at `cache.site`: `make_rule` is called with the YAML file's options, the knob among them."""
    options, share = setup.options, setup.reuse_share()

    def attach_with(value: float) -> Attach:
        rule = make_rule(**{**options, knob.name: value})
        return lambda pipe: online(pipe, rule, setup.cfg.cache.site, setup.cfg.cache.reuse, share)

    return knob_arm(setup, knob, attach_with)


def knob_arm(setup: Setup, knob: Knob, attach_with: Callable[[Any], Attach]) -> Arm:
    """The arm at the knob's value in the configuration, or at the one that meets the budget.

    Raises BudgetError for a knob and a budget at once, and for a budget that no value meets.
    """
    given = setup.options[knob.name]
    if given is not None:
        asked = [key for key in BUDGETS if setup.cfg.cache[key] is not None]
        if asked:
            raise BudgetError(f"cache.options.{knob.name} and cache.{asked[0]} at once: give one of them")
        return Arm(None, setup.kwargs, attach=attach_with(given), report={"knob": knob.name, "value": given})
    report = _known_or_found(setup, knob, attach_with)
    return Arm(None, setup.kwargs, attach=attach_with(report["value"]), report=report)


def _known_or_found(setup: Setup, knob: Knob, attach_with: Callable[[Any], Attach]) -> dict[str, Any]:
    """The search's result, kept for the next run of the same method on the same model, grid and budget."""
    cfg, target = setup.cfg, setup.step_count()
    prompts = setup.calibration_prompts[: cfg.calibration.knob_prompts]

    def find() -> dict[str, Any]:
        with progress_bar() as bar:
            task = bar.add_task(f"{knob.name} for {target} steps ({len(prompts)} prompts a try)", total=None)

            def steps_at(value: float) -> float:
                bar.advance(task)
                return mean_computed_steps(setup, attach_with(value), prompts)

            return search(steps_at, knob, target, cfg.cache.name, cfg.model.num_inference_steps)

    asked = [setup.options, cfg.cache.reuse, prompts, target]
    before = [[place, *asked] for place in _places_before(cfg.cache._target_)]
    report = kept(setup, f"{cfg.cache.name}-knob", [cfg.cache.name, *asked], find, before)
    console.note(
        f"{cfg.cache.name}: {knob.name}={report['value']:g} makes {report['computed']:.2f} computed steps on "
        f"{len(prompts)} calibration prompts ({target} asked for, {len(report['tried'])} values tried)"
    )
    return {**report, "prompts": prompts}


def _places_before(target: str) -> list[str]:
    """Where the method of a `_target_` stood in earlier versions, by which they kept what they found."""
    module, _, function = target.removeprefix("experiments.methods.").rpartition(".")
    shipped = module.removesuffix("_diffusers")
    return [f"experiments.peers.{module}.{function}", f"experiments.peers.shipped.{shipped}"]


def mean_computed_steps(setup: Setup, attach: Attach, prompts: list[str]) -> float:
    """Forwards per guidance branch of runs under a cache, mean over prompts."""
    pipe, counts = setup.pipe, []
    with attach(pipe) as trace:
        for index, prompt in enumerate(prompts):
            pipe(**latent_call(prompt, CALIBRATION_SEED + index, setup.kwargs))
            counts.append(_computed_steps(trace))
    return sum(counts) / len(counts)


def _computed_steps(trace: CallTrace) -> float:
    return sum(trace.forwards.values()) / len(trace.forwards)


def search(steps_at: Callable[[float], float], knob: Knob, target: int, method: str, num_steps: int) -> dict[str, Any]:
    """Bisect for the knob at which `target` steps are computed: {knob, value, computed, asked, tried}.

    The value whose count is nearest is taken if it is within half a step. Where counts jump over the target, the
    value with the most steps below it is taken, so that a method never gets more than the budget.

    Raises BudgetError if the method cannot get down to the target, or reuses nothing whatever the knob.
    """
    tried = {knob.high: steps_at(knob.high)}
    least = tried[knob.high]
    if least > num_steps - 1e-6:
        raise BudgetError(
            f"cache={method} did not reuse anything: also with {knob.name}={knob.high:g} all {num_steps} steps are "
            "computed. Change its other cache.options."
        )
    if least > target + WITHIN:
        raise BudgetError(
            f"cache={method} cannot get down to {target} of {num_steps} computed steps with its other options: it "
            f"reaches {math.ceil(least)} to {num_steps}. Ask for at least cache.steps={math.ceil(least)}, or change cache.options."
        )
    low, high = knob.low, knob.high
    while len(tried) < MAX_TRIES and min(abs(count - target) for count in tried.values()) > CLOSE_ENOUGH:
        value = knob.between(low, high)
        if value is None:
            break
        tried[value] = steps_at(value)
        low, high = (value, high) if tried[value] > target else (low, value)
    if knob.low not in tried and min(abs(count - target) for count in tried.values()) > WITHIN:
        tried[knob.low] = steps_at(knob.low)
    value = min(tried, key=lambda tried_value: abs(tried[tried_value] - target))
    if abs(tried[value] - target) > WITHIN:
        below = {key: count for key, count in tried.items() if count < target}
        value = max(below, key=lambda tried_value: below[tried_value])
    return {
        "knob": knob.name,
        "value": value,
        "computed": tried[value],
        "asked": target,
        "tried": [[key, tried[key]] for key in sorted(tried)],
    }
