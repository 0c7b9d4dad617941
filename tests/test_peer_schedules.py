"""Searched schedules: against brute force, by hand, and through the harness."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import erta
from erta.online import Call
from experiments.peers import lemica
from experiments.peers.budcache import acceptance, anneal, temperature_at
from experiments.peers.gcache import edge_costs, residual_change
from experiments.peers.lemica import cost_matrix
from experiments.peers.meancache import MeanCache, path_costs
from experiments.peers.paths import best_path
from experiments.peers.searched import TrajectoryRecorder
from tests.test_cli import command, folders, weights  # noqa: F401


def edges_of(mask):
    nodes = [*(k for k, on in enumerate(mask) if on), len(mask)]
    return list(itertools.pairwise(nodes))


def every_mask(num_steps, count):
    for chosen in itertools.combinations(range(1, num_steps), count - 1):
        yield tuple(k == 0 or k in chosen for k in range(num_steps))


@pytest.mark.parametrize("minimax", [False, True])
def test_paths_against_all_masks(minimax):
    """Mutants: the end's edge left out, one edge more or less, the sum for the sorted list."""
    cost = np.random.default_rng(0).random((8, 9))

    def total(mask):
        spent = [cost[edge] for edge in edges_of(mask)]
        return tuple(sorted(spent, reverse=True)) if minimax else sum(spent)

    for count in (1, 3, 6, 8):
        assert best_path(cost, count, minimax) == min(every_mask(8, count), key=total)


def test_minimax_by_hand():
    """Edges of 5 (0 → 2) and 4 (1 → 3): the smaller worst one is taken, {0, 1}. What was not measured is never taken."""
    edges = [[0, 2, 5.0], [1, 3, 4.0], [0, 3, 9.0]]
    cost = cost_matrix(edges, 3)
    assert best_path(cost, 2, minimax=True) == (True, True, False)  # 0 → 1 → 3: worst 4
    assert best_path(cost, 1) == (True, False, False) and best_path(cost, 3) == (True, True, True)
    with pytest.raises(erta.BudgetError, match="what can be: 2 to 4"):
        best_path(cost_matrix([[0, 2, 1.0], [2, 4, 1.0]], 4), 1)


def test_annealing_finds_the_best_mask():
    """10 steps, 5 computed, the first one (30 % of 5) fixed; the error counts steps that are not 0, 2, 3, 7, 9.

    Mutants: the prefix exchanged too, the last mask returned in place of the best, the budget not kept.
    """
    seen = []

    def error(mask):
        seen.append(mask)
        return float(sum(on != (k in (0, 2, 3, 7, 9)) for k, on in enumerate(mask)))

    mask, value = anneal(error, 10, 5, 200, seed=0)
    assert value == 0 and [k for k, on in enumerate(mask) if on] == [0, 2, 3, 7, 9]
    assert all(sum(tried) == 5 and tried[0] for tried in seen) and len(set(seen)) == len(seen)
    assert anneal(error, 10, 10, 5, 0)[0] == (True,) * 10


def test_annealing_accepts_by_chance():
    """Temperatures 1 → 0.1 → 0.01 over 3 trials; a rise of 0.5 is taken with probability exp(-0.5), exp(-5), exp(-50).

    Mutants: worse masks never taken, or whatever the temperature; a temperature that rises; the last mask returned.
    """
    assert [temperature_at(trial, 3) for trial in range(3)] == pytest.approx([1, 0.1, 0.01])
    assert [acceptance(0.5, t) for t in (1, 0.1, 0.01)] == pytest.approx([0.60653, 0.0067379, 1.9287e-22], rel=1e-4)
    assert acceptance(0.0, 0.01) == acceptance(-3.0, 1) == 1
    started = []

    def error(mask):
        started.append(mask)
        return float(len(started))  # every new mask is worse than all before

    mask, value = anneal(error, 12, 4, 60, seed=0)
    assert value == 1.0 and mask == started[0]  # the best, wherever the annealing went
    exchanged = [sum(a != b for a, b in zip(tried, started[0], strict=True)) // 2 for tried in started]
    assert max(exchanged) > 1  # masks beyond the first one's neighbours were tried, so a worse one was taken


def test_lemica_runs_every_stretch_once(monkeypatch):
    """4 steps, stretches of at most 2 reused: steps i + 1 … j - 1, the last stretch to the end; cost: mean |x - x_0|.

    Mutants: the step computed next reused too, stretches one longer, the squared error.
    """
    runs = []

    def run(mask):
        runs.append(mask)
        return torch.full((2, 2), 0.0 if mask is None else float(sum(2**k for k, on in enumerate(mask) if not on)))

    monkeypatch.setattr(lemica, "trial_runs", lambda cfg, pipe: run)
    cfg = OmegaConf.create({"model": {"num_inference_steps": 4}})
    edges = lemica.stretch_costs(cfg, None, max_skip=2)
    assert (
        edges == [[0, 2, 2], [0, 3, 2 + 4], [1, 3, 4], [1, 4, 4 + 8], [2, 4, 8]] and runs[0] is None and len(runs) == 6
    )


def test_gcache_changes_by_hand():
    """r = 0, 1, 3 in one branch and 0, 2, 2 in the other: |r_0 - r_2| = (3 + 2) / 2. Mutants: a sum, velocities, x."""
    recorder = TrajectoryRecorder()
    recorder.begin(3)
    x = torch.zeros(1, 2)
    for branch, residuals in {"cond": (0.0, 1.0, 3.0), "uncond": (0.0, 2.0, 2.0)}.items():
        for step, r in enumerate(residuals):
            recorder.computed(Call(step, 3, branch, x + 7 * step, torch.nn.Identity()), x + 9 * step, x + r)
    np.testing.assert_allclose(residual_change(recorder), [[0, 1.5, 2.5], [0, 0, 1.0], [0, 0, 0]])


def test_gcache_edges_by_hand():
    """|r_i - r_k| = k - i, 4 steps, w = 3 t (Bernstein coefficients 0, 1, 2, 3): weights e^0, e^1, e^2, e^3.

    0 → 2 reuses step 1: 1 e; 0 → 4 reuses 1, 2, 3: e + 2 e² + 3 e³; 2 → 4 reuses 3: e³.
    Mutants: the weight of the source's time, the step computed next counted too, the polynomial's powers.
    """
    change = np.abs(np.arange(4)[:, None] - np.arange(4)).astype(float)
    cost, e = edge_costs(change, np.array([0.0, 1.0, 2.0, 3.0])), np.e
    assert cost[0, 2] == pytest.approx(e) and cost[2, 4] == pytest.approx(e**3)
    assert cost[0, 4] == pytest.approx(e + 2 * e**2 + 3 * e**3) and cost[1, 2] == 0
    assert best_path(cost, 2) == (True, False, False, True)  # e + 2 e² is less than what any other leaves


def test_meancache_by_hand():
    """Steps 0 and 2 of 4 computed, sigma 1, 0.9, 0.8, 0.6, 0; z = 5, 4, 3, …; v = cond 10, uncond 8 at 0, then 16 and 14.

    Guidance 2: v = 8 + 2 (10 - 8) = 12 and 14 + 2 (16 - 14) = 18. Step 1 reuses 10 and 8: one point makes no path.
    JVP at step 2: (z_2 - z_0) / (0.8 - 1) = -2 / -0.2 = 10, so (18 - 10) / (0.8 - 1) = -40. Step 3 is reused, 0.2 on:
    -0.2 · -40 = +8 in both branches: 24 and 22.

    Mutants: the earlier step's velocity in JVP, the branch's own in place of the guided one, sigma of the next step.
    """
    sigmas = np.array([1, 0.9, 0.8, 0.6, 0], np.float32)
    rule = MeanCache((True, False, True, False), sigmas, 2.0)
    latents = [5.0, 4.0, 3.0, 2.0]
    outputs = {0: {"cond": 10.0, "uncond": 8.0}, 2: {"cond": 16.0, "uncond": 14.0}}
    for _ in range(2):  # a second call starts anew
        rule.begin(4)
        used, last = {}, {}
        for step, latent in enumerate(latents):
            for branch in ("cond", "uncond"):
                call = Call(step, 4, branch, torch.full((1,), latent), torch.nn.Identity())
                if step == 0 or rule.should_compute(call):
                    last[branch] = torch.full((1,), outputs[step][branch])
                    rule.computed(call, last[branch], last[branch])
                else:
                    used[step, branch] = rule.stand_in(call, last[branch]).item()
        made = {(1, "cond"): 10.0, (1, "uncond"): 8.0, (3, "cond"): 24.0, (3, "uncond"): 22.0}
        assert used == pytest.approx(made, abs=1e-4)
    with pytest.raises(erta.ErtaError, match="for 4 steps, not 5"):
        rule.begin(5)


def test_meancache_path_costs_by_hand():
    """v = 6 - 4 sigma on sigma 1, 0.75, 0.5, 0.25, 0, so v = 2, 3, 4, 5 and z its sum by Euler's rule.

    Mutants: the step next to i for r, the whole stretch moved by its last velocity, costs of edges that are not there.
    """
    sigmas = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    v = 6 - 4 * sigmas[:-1]
    z = np.concatenate([[0.0], np.cumsum(np.diff(sigmas) * v)])
    recorder = TrajectoryRecorder()
    recorder.begin(4)
    recorder.seen["single"] = [
        (torch.tensor([a]), torch.tensor([b]), torch.zeros(1)) for a, b in zip(z, v, strict=False)
    ]
    costs = path_costs(recorder, sigmas, None)
    assert costs[0, 1] == costs[2, 3] == 0 and costs[1, 0] == costs[1, 1] == -1
    # from 0 no path: 0 → 2 moves -0.25 · 2 in the place of -0.25 · 3
    assert costs[0, 2] == pytest.approx(0.25)
    # 1 → 3 with r = 0: JVP = (3 - 2) / -0.25 = -4, the slope itself, so step 2 is met: 3 + (-0.25) (-4) = 4
    assert costs[1, 3] == pytest.approx(0, abs=1e-6)
    # 2 → 4 with r = 0: the mean since 0 is 2.5, JVP = (4 - 2.5) / -0.5 = -3: step 3 is 4 + 0.75, 0.25 short of 5
    assert costs[2, 4] == pytest.approx(0.25 * 0.25)


def test_the_grid_of_a_searched_schedule(command, tmp_path):  # noqa: F811
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


PEERS = {"gcache": ["cache.options.trials=2"], "lemica": [], "budcache": ["cache.options.iterations=3"]}


@pytest.mark.slow
@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Exactly the budget, as a plan, whose file is written."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=3", *PEERS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    assert record["steps"]["computed"] == 3 == sum(plan["steps"]["mask"]) and record["timing"]["forwards"] == 6
    assert plan["report"]["policy"] == cache and record["metrics"]["psnr_db"] > 0
