"""The grid of another method, without a cache."""

from __future__ import annotations

import json

import numpy as np
import pytest

import erta
from tests.commands import folders


@pytest.mark.slow
def test_the_grid_of_a_searched_schedule(command, tmp_path):
    """As many forwards and steps as the schedule computes, on its sigmas, and the search's seconds are its own.

    Mutants: the nominal grid, the policy's steps for every method, a search that costs nothing when it was kept.
    """
    seconds = {}
    for cache in (["cache=gcache"], ["cache=plan_grid", "cache.options.of=gcache"]):
        more = ["cache.options.trials=16"] if len(cache) == 1 else []
        code, printed = command(*cache, *more, "bench=fidelity", "cache.steps=3")
        assert code == 0, printed
        folder = folders(tmp_path)[-1]
        record, plan = json.loads((folder / "record.json").read_text()), erta.Plan.load(folder / "plan.json")
        seconds[cache[0]] = record["timing"]["calibration_s"]
        if len(cache) == 1:
            computed = plan.sigmas[:-1][np.array(plan.mask)]
    assert record["steps"] == {**record["steps"], "computed": 3, "total": 3} and record["timing"]["forwards"] == 6
    np.testing.assert_allclose(plan.sigmas, [*computed, 0.0])
    assert all(plan.mask)
    assert seconds["cache=plan_grid"] == seconds["cache=gcache"] > 0.05
    for name, why in {"fora": "fora does not choose beforehand", "gcash": "there is no such method"}.items():
        code, printed = command("cache=plan_grid", f"cache.options.of={name}", "cache.steps=5")
        assert code == 1 and why in printed, printed
