"""Methods in the scheduler's place: ERTAPlan, L2P, Adams-Bashforth; and grids that are searched for: GITS, OSS."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch

import erta
from erta.fitted_scheduler import FittedScheduler
from erta.lockstep import Asked
from erta.online import online
from erta.policy import uniform_mask
from erta.scheduler import nominal_sigmas, with_grid
from erta.solver import Computed, linear_solver
from experiments.harness.setup import Setup
from experiments.methods.adams_bashforth import arm as adams_bashforth_arm
from experiments.methods.adams_bashforth import weights
from experiments.methods.common import solvers
from experiments.methods.ertaplan import arm
from experiments.methods.gits import edge_costs, weighted_path
from experiments.methods.l2p import RIDGES, combination_of, cross_validated_ridge
from experiments.methods.l2p import combinations as l2p_weights
from experiments.methods.meancache import MeanCache, foretold
from experiments.methods.oss import Search
from experiments.output.files import read_lines
from tests.commands import config, folders
from tests.pipelines import CALL, PROMPTS, STEPS, build_pipe, run


@pytest.fixture(scope="module")
def trajectories():
    return erta.record(build_pipe("euler"), PROMPTS, decode=False, **CALL)


def test_adams_bashforth_by_hand():
    """Uneven steps: h + h² / 2h' and -h² / 2h'. Mutants: even steps' 3/2 and -1/2, the step before for this one."""
    found = weights(np.array([1.0, 0.8, 0.5, 0.0]), 2)
    wanted = [[-0.2, 0.0], [-0.3 - 0.09 / 0.4, 0.09 / 0.4], [-0.5 - 0.25 / 0.6, 0.25 / 0.6]]
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    np.testing.assert_allclose(weights(np.array([1.0, 0.8, 0.5]), 1)[:, 0], [-0.2, -0.3])
    third = weights(np.linspace(1, 0, 6), 3)[3] / -0.2
    np.testing.assert_allclose(third, [23 / 12, -16 / 12, 5 / 12], atol=1e-12)


def test_gits_costs_and_path():
    """One Euler step over recorded steps, and the path against every other. Mutants: L1, the coefficient on the first edge."""
    rng = np.random.default_rng(0)
    latents, outputs = rng.normal(size=(2, 6, 7)), rng.normal(size=(2, 5, 7))
    sigmas = np.array([1.0, 0.8, 0.6, 0.3, 0.1, 0.0])
    costs = edge_costs(latents, outputs, sigmas)
    by_hand = [np.linalg.norm(latents[p, 1] + (0.3 - 0.8) * outputs[p, 1] - latents[p, 3]) for p in range(2)]
    assert costs[1, 3] == pytest.approx(np.mean(by_hand)) and np.isinf(costs[2, 2])

    def total(nodes: tuple[int, ...]) -> float:
        path = (0, *nodes, 5)
        return sum(1.5**k * costs[path[k], path[k + 1]] for k in range(len(path) - 1))

    for count in (1, 3, 5):
        best = min(combinations(range(1, 5), count - 1), key=total)
        assert weighted_path(costs, count, 1.5) == tuple(step in (0, *best) for step in range(5))
    with pytest.raises(erta.BudgetError):
        weighted_path(costs, 6, 1.0)


def test_oss_search_is_its_recursion(trajectories):
    """Against the recursion written out with a model in closed form, v = x / 2 + sigma. Mutants: best by the last edge alone,
    the state of another number of steps spent."""
    sigmas, count, steps = trajectories.sigmas, 3, trajectories.num_steps
    wanted = torch.from_numpy(trajectories.latents)
    start = wanted[:, 0]

    def model(x: torch.Tensor, step: int) -> torch.Tensor:
        return x / 2 + float(sigmas[step])

    best = {(0, 0): (start, [])}
    for spent in range(count):
        for later in range(1, steps + 1):
            options = []
            for now in range(later):
                if (spent, now) in best:
                    x, path = best[spent, now]
                    reached = x + float(sigmas[later] - sigmas[now]) * model(x, now)
                    options.append(((reached - wanted[:, later]).norm(dim=1).mean().item(), reached, [*path, now]))
            if options:
                _, reached, path = min(options, key=lambda option: option[0])
                best[spent + 1, later] = reached, path
    search = Search(trajectories, count)
    latents = [start.clone() for _ in range(count)]
    for node in range(steps):
        latents = search.step(node, [Asked(model(x, node), x) for x in latents])
    assert [step for step, on in enumerate(search.mask()) if on] == best[count, steps][1]


def test_l2p_finds_the_combination():
    """An output that is one of earlier ones comes back exactly; reused steps take computed ones alone."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(3, 4, 50))
    outputs[:, 3] = 0.5 * outputs[:, 0] - 2 * outputs[:, 2]
    given = erta.Trajectories(
        latents=np.zeros((3, 5, 50)), outputs=outputs, positions=np.arange(50), channels=np.zeros(50, int),
        decoded=np.zeros((3, 0)), signature={"sigmas": [1, 0.8, 0.5, 0.2, 0]}, record={},
    )  # fmt: skip
    found = l2p_weights(given, (True, False, True, False), 0.0)
    np.testing.assert_allclose(found[3], [0.5, -2.0], atol=1e-9)
    assert set(found) == {1, 3} and len(found[1]) == 1
    seen = [Computed(0, torch.zeros(1), torch.full((1,), 4.0)), Computed(2, torch.zeros(1), torch.ones(1))]
    assert combination_of(found)(3, torch.zeros(1), seen).item() == pytest.approx(0.5 * 4 - 2)


def test_l2p_chooses_its_ridge_on_prompts_left_out():
    """Noise-free outputs want none; where each prompt is another world, a strong one. Against the errors written out with lstsq.

    Mutants: the error on the prompts fitted to, the largest error chosen, prompts counted by their size.
    """
    rng = np.random.default_rng(0)
    mask = (True, True, False, True, False)

    def given(outputs: np.ndarray) -> erta.Trajectories:
        return erta.Trajectories(
            latents=np.zeros((len(outputs), 6, 30)), outputs=outputs, positions=np.arange(30),
            channels=np.zeros(30, int), decoded=np.zeros((len(outputs), 0)),
            signature={"sigmas": [1, 0.8, 0.6, 0.4, 0.2, 0]}, record={},
        )  # fmt: skip

    clean = rng.normal(size=(4, 5, 30))
    clean[:, 2] = clean[:, 0] - clean[:, 1]
    clean[:, 4] = 0.5 * clean[:, 3] + clean[:, 1]
    assert cross_validated_ridge(given(clean), mask) == min(RIDGES)
    shared = rng.normal(size=(1, 1, 30))
    near = shared + 0.01 * rng.normal(size=(3, 5, 30))  # nearly collinear: weights without a ridge fit noise
    near[0] *= 50

    def error(ridge: float) -> float:
        found = 0.0
        for left in range(3):
            rest = np.delete(near, left, axis=0)
            for step, sources in ((2, [0, 1]), (4, [0, 1, 3])):
                a = rest[:, sources].transpose(0, 2, 1).reshape(-1, len(sources))
                pull = np.diag(np.sqrt(ridge * (a**2).sum(0)))
                b = np.append(rest[:, step].ravel(), np.zeros(len(sources)))
                weights = np.linalg.lstsq(np.vstack([a, pull]), b, rcond=None)[0]
                wanted = near[left, step]
                found += ((wanted - weights @ near[left, sources]) ** 2).sum() / (wanted**2).sum()
        return found

    best = cross_validated_ridge(given(near), mask)
    assert best == min(RIDGES, key=error) and best > 1e-6
    assert cross_validated_ridge(given(near[:1]), mask) == RIDGES[len(RIDGES) // 2]


def test_meancache_is_a_solver():
    """Collapsed, it is the hooked run. Mutants: the latent of the last step for that of the one before, sigma of the next."""
    pipe = build_pipe("unipc")
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, mask = nominal_sigmas(pipe.scheduler), uniform_mask(STEPS, 4)
    with online(pipe, MeanCache(mask, sigmas, CALL["guidance_scale"]), reuse="velocity"):
        hooked = run(pipe)
    solver = linear_solver(with_grid(pipe.scheduler, sigmas), mask, predict=foretold(sigmas))
    pipe.scheduler = FittedScheduler(solver, pipe.scheduler)
    found = run(pipe, num_inference_steps=4)
    assert (found - hooked).norm() / hooked.norm() < 1e-5


def test_what_is_recorded_and_fitted_is_kept(tmp_path, monkeypatch):
    """A second arm records and fits nothing; an interrupted recording goes on after the prompts that are done.

    Mutants: a key without the prompts, seeds that begin anew.
    """
    monkeypatch.chdir(tmp_path)
    kwargs = {**CALL, "num_inference_steps": 6}
    cfg = config(
        "cache=ertaplan",
        "cache.steps=3",
        "calibration.num_prompts=3",
        *[f"model.{key}={value}" for key, value in kwargs.items()],
    )
    setup = Setup(cfg, build_pipe("unipc"))
    asked = []
    whole = erta.record

    def stops(pipe, prompts, **changes):
        asked.append(len(prompts))
        if len(asked) == 1:
            keep = changes["on_prompt"]

            def stop_after_one(count, so_far):
                keep(count, so_far)
                raise KeyboardInterrupt

            changes["on_prompt"] = stop_after_one
        return whole(pipe, prompts, **changes)

    monkeypatch.setattr(erta, "record", stops)
    with pytest.raises(KeyboardInterrupt):
        solvers.get_trajectories(setup)
    made = solvers.get_trajectories(setup)
    assert asked == [3, 2]
    straight = whole(setup.pipe, setup.calibration_prompts, seed=solvers.CALIBRATION_SEED, **setup.kwargs)
    np.testing.assert_array_equal(made.latents, straight.latents)
    first = arm(setup)
    monkeypatch.setattr(erta, "fit", None)
    again = arm(setup)
    assert asked == [3, 2] and sum(again.report["mask"]) == 3 == again.kwargs["num_inference_steps"]
    np.testing.assert_allclose(again.solver.velocity, first.solver.velocity)
    assert (
        solvers.solver_of(setup, again) is again.solver and again.solver.timesteps.dtype == first.solver.timesteps.dtype
    )


def test_adams_bashforth_takes_the_nodes_that_ertaplan_chose(tmp_path, monkeypatch, capsys):
    """And a budget below plain ERTACache is told in a line, again of a kept solver. Mutant: planned nodes, where cross-validation
    chose others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("erta.fitting.placed_nodes", lambda *_: {"even": (0, 1, 5)})
    kwargs = {**CALL, "num_inference_steps": 6}
    values = [f"model.{key}={value}" for key, value in kwargs.items()]
    cfg = config("cache=adams_bashforth", "cache.steps=3", "calibration.num_prompts=2", *values)
    found = adams_bashforth_arm(Setup(cfg, build_pipe("euler")))
    assert found.report["mask"] == [1, 1, 0, 0, 0, 1] and found.kwargs["num_inference_steps"] == 3
    np.testing.assert_allclose(found.solver.velocity[:, :, 0], weights(found.solver.sigmas, 2), atol=1e-6)
    assert found.searched_s > 0
    said = "3 of 6 steps: "
    assert said in capsys.readouterr().out
    adams_bashforth_arm(Setup(cfg, build_pipe("euler")))
    assert said in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["ertaplan", "l2p", "adams_bashforth", "gits", "oss", "ertaplan_oracle_nodes"])
def test_solvers_in_the_harness(command, tmp_path, cache):
    """Through the command line: exactly the budget's forwards, whole, and nothing is cached."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=4")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    assert {row["cached"]["forwards"] for row in rows} == {8} and record["steps"]["computed"] == 4
    assert record["memory"]["cache_bytes"] == 0 and record["metrics"]["psnr_db"] > 0
    assert sum(record["plan_report"]["mask"]) == 4
