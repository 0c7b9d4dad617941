"""BudCache (Lei et al., 2026, arXiv 2606.13496): annealing over masks of a given budget, by the final latents.

Site: as `cache.site` says; the output by default. Stored: the last residual in each guidance branch. Static: from
evenly spread steps on, `iterations` times one computed step is exchanged for a reused one; the new mask is kept if the
mean squared error of the final latents on one calibration prompt falls, or with probability exp(-rise / temperature).
Then exchanges with neighbours are made as long as they help. The first 30 % of the budget stay the first steps. Where
we differ: the error is taken in logarithm, so that the temperature (1 → 0.01) has no unit; the grid of sigmas is not
distilled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from erta.policy import Mask, uniform_mask
from experiments.harness.arm import Arm
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.knob import check_number
from experiments.methods.common.searched import planned_arm, trial_runs
from experiments.output.console import progress_bar

PREFIX = 0.3
HOT, COLD = 1.0, 0.01


def arm(setup: Setup) -> Arm:
    """BudCache's mask for the budget; every number of computed steps can be reached."""
    iterations, count = check_number("iterations", setup.options["iterations"], 0, whole=True), setup.step_count()

    def find() -> dict[str, Any]:
        run = trial_runs(setup)
        reference = run(None)
        with progress_bar() as bar:
            task = bar.add_task("budcache: masks", total=None)

            def error(mask: Mask) -> float:
                bar.advance(task)
                return math.log((run(mask) - reference).pow(2).mean().item() + 1e-20)

            mask, value = anneal(error, setup.cfg.model.num_inference_steps, count, iterations, setup.cfg.seed)
        return {"mask": [int(step) for step in mask], "log_mse": value}

    made_with = [iterations, count, setup.cfg.seed, setup.cfg.cache.reuse, setup.cfg.cache.corrector_at_reused]
    report = kept(setup, "budcache", made_with, find)
    return planned_arm(setup, tuple(map(bool, report["mask"])), report)


def anneal(
    error: Callable[[Mask], float], num_steps: int, count: int, iterations: int, seed: int
) -> tuple[Mask, float]:
    """The best mask found, with its error."""
    prefix = max(1, int(PREFIX * count))
    rest = uniform_mask(num_steps - prefix, count - prefix) if count > prefix else (False,) * (num_steps - prefix)
    now: Mask = (True,) * prefix + rest
    known = {now: error(now)}
    if prefix == count or count == num_steps:
        return now, known[now]
    chance = random.Random(seed)
    for trial in range(iterations):
        computed = [step for step in range(prefix, num_steps) if now[step]]
        reused = [step for step in range(prefix, num_steps) if not now[step]]
        new = _exchanged(now, chance.choice(computed), chance.choice(reused))
        if new not in known:
            known[new] = error(new)
        taken = acceptance(known[new] - known[now], temperature_at(trial, iterations))
        if taken == 1 or chance.random() < taken:
            now = new
    return _climb(error, min(known, key=known.__getitem__), prefix, known)


def temperature_at(trial: int, iterations: int) -> float:
    """From HOT at the first trial to COLD at the last, by equal factors."""
    return HOT * (COLD / HOT) ** (trial / max(1, iterations - 1))


def acceptance(rise: float, temperature: float) -> float:
    """The probability with which a mask is taken whose error is larger by `rise` (Metropolis's rule)."""
    return math.exp(-max(rise, 0.0) / temperature)


def _climb(error: Callable[[Mask], float], now: Mask, prefix: int, known: dict[Mask, float]) -> tuple[Mask, float]:
    better = True
    while better:
        better = False
        for step in range(prefix, len(now) - 1):
            if now[step] == now[step + 1]:
                continue
            new = _exchanged(now, step, step + 1)
            if new not in known:
                known[new] = error(new)
            if known[new] < known[now]:
                now, better = new, True
    return now, known[now]


def _exchanged(mask: Mask, a: int, b: int) -> Mask:
    changed = list(mask)
    changed[a], changed[b] = changed[b], changed[a]
    return tuple(changed)
