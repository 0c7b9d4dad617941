"""Recorded trajectories, planned nodes, and coefficients fitted along the solver's own run."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

import erta
from erta import fitting, least_squares
from erta.baseline import ertacache_scheduler, residual_changes
from erta.lockstep import run_in_step
from erta.nodes import gram, local_errors, nodes_for, placed_nodes
from tests.pipelines import CALL, PROMPTS, STEPS, build_pipe, run

MANY = [
    *PROMPTS,
    "a small green square moving up on a dark background",
    "a large red star rising on a light background",
]
ONE_RUN = erta.FitOptions(placement="planned", baseline=False)


@pytest.fixture(scope="module")
def recorded():
    """By solver, four prompts' trajectories on the tiny random pipeline."""
    return {solver: erta.record(build_pipe(solver), MANY, **CALL) for solver in ("euler", "unipc")}


def test_trajectories_are_what_the_scheduler_saw(recorded):
    """Mutants: the latent after the step for the one before, the branches' outputs for the guided one, seeds off by one."""
    found = recorded["euler"]
    assert found.latents.shape == (4, STEPS + 1, 512) and found.outputs.shape == (4, STEPS, 512)
    steps = np.diff(found.sigmas)[None, :, None]
    np.testing.assert_allclose(np.diff(found.latents, axis=1), steps * found.outputs, atol=2e-5)
    wanted = run(build_pipe("euler"), MANY[2], seed=2).flatten()[found.positions]
    np.testing.assert_allclose(found.latents[2, -1], wanted.numpy(), atol=1e-6)
    assert found.signature["guidance_scale"] == 4.0 and found.record["prompts"] == MANY
    assert (np.bincount(found.channels) == 32).all() and found.decoded.min() >= 0 and found.decoded.max() <= 1


def test_a_sample_of_positions_and_batches(recorded, tmp_path):
    """The same values at fewer places, and prompts in one call; a file gives back what was saved, and a damaged one is named."""
    pipe = build_pipe("euler")
    few = erta.record(pipe, MANY, positions=100, batch_size=3, decode=False, **CALL)
    places = np.searchsorted(recorded["euler"].positions, few.positions)
    np.testing.assert_allclose(few.latents, recorded["euler"].latents[:, :, places], atol=1e-4)
    assert few.decoded.shape == (4, 0) and len(few.positions) == 100
    few.save(tmp_path / "few.safetensors")
    again = erta.Trajectories.load(tmp_path / "few.safetensors")
    assert np.array_equal(again.outputs, few.outputs) and again.record == few.record
    assert again.only([1, 2]).merge(again.only([0])).record["prompts"] == [MANY[1], MANY[2], MANY[0]]
    (tmp_path / "few.safetensors").write_bytes(b"nothing")
    with pytest.raises(erta.ErtaError, match=r"few\.safetensors"):
        erta.Trajectories.load(tmp_path / "few.safetensors")


def test_local_errors_by_least_squares(recorded):
    """From the Gram matrix = from the vectors. Mutants: prompts weighed by their size, v[h] for v[i] - v[h] alone."""
    x, v = recorded["unipc"].latents.astype(float), recorded["unipc"].outputs.astype(float)
    found = local_errors(gram(x, v))
    size = np.sqrt((x**2).sum(axis=2).mean(axis=1))[:, None]
    for h, i, j in ((0, 0, 3), (1, 3, 5), (0, 5, 8)):
        wanted = ((x[:, j] - x[:, i]) / size).ravel()
        features = [(v[:, i] / size).ravel(), ((v[:, i] - v[:, h]) / size).ravel()][: 1 + (i > 0)]
        left = wanted - np.stack(features, 1) @ np.linalg.lstsq(np.stack(features, 1), wanted, rcond=None)[0]
        assert found.at[h, i, j] == pytest.approx(np.sqrt(left @ left / len(x)), rel=1e-5)
    assert np.isinf(found.at[0, 0, 0]) and np.isinf(found.at[3, 2, 4])
    worst = local_errors(gram(x, v), over_prompts="worst")
    assert worst.at[1, 3, 5] > found.at[1, 3, 5]


def test_least_squares_finds_what_made_the_target():
    """Coefficients come back; a ridge pulls to the rule given; a prompt alone does not decide. Mutant: squares unweighted."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, 6, 200))
    true = np.array([0.3, -0.1, 0.05, 0.2, -0.4, 0.1])
    target = np.einsum("f,pfm->pm", true, features)
    products = least_squares.products_of(target, features)
    everything = range(6)
    np.testing.assert_allclose(least_squares.solve(products, np.zeros(6), everything, 0.0), true, atol=1e-8)
    own = np.ones(6)
    np.testing.assert_allclose(least_squares.solve(products, own, everything, 1e9), own, atol=1e-6)
    np.testing.assert_allclose(least_squares.solve(products, own, [0, 3], 0.0)[[1, 2, 4, 5]], 0)
    target[0] = 10 * np.einsum("f,fm->m", rng.normal(size=6), features[0])  # one prompt that is another world
    products = least_squares.products_of(target, features)
    weighted = least_squares.solve(products, np.zeros(6), everything, 0.0)
    plain = least_squares.solve(products, np.zeros(6), everything, 0.0, weighted=False)
    assert np.abs(weighted - true).max() < 0.01 < np.abs(plain - true).max()
    out = least_squares.leave_one_out(products, np.zeros(6), everything, 0.0)
    np.testing.assert_allclose(out[0], true, atol=1e-8)
    terms, ridge = least_squares.best_setting(
        least_squares.products_of(features[:, 0], features), own, None, None, True
    )
    assert terms[0] == 0 and ridge == min(least_squares.RIDGES)


def test_one_term_and_eulers_target_is_euler(recorded):
    """All nodes, one term, no pull: the step's length. And as many nodes as steps are the uncached run."""
    pipe = build_pipe("euler")
    options = erta.FitOptions(terms=1, ridge=0.0, validate=False)
    scheduler = erta.fit(pipe, recorded["euler"], steps=STEPS, options=options)
    assert scheduler.solver.nodes == tuple(range(STEPS)) and not scheduler.solver.latent.any()
    np.testing.assert_allclose(scheduler.solver.velocity[:, 0, 0], np.diff(recorded["euler"].sigmas), atol=1e-5)
    uncached = run(pipe, MANY[0])
    pipe.scheduler = scheduler
    assert (run(pipe, MANY[0]) - uncached).norm() / uncached.norm() < 1e-4


def test_every_node_gives_the_uncached_run_under_unipc(recorded):
    """Six terms span UniPC's predictor and corrector. Mutants: x - x1 with the other sign, a history of two."""
    pipe = build_pipe("unipc")
    scheduler = erta.fit(
        pipe, recorded["unipc"], steps=STEPS, options=erta.FitOptions(terms=6, ridge=1e-9, validate=False)
    )
    uncached = run(pipe, MANY[1], seed=77)  # a noise that it was not fitted to
    pipe.scheduler = scheduler
    assert (run(pipe, MANY[1], seed=77) - uncached).norm() / uncached.norm() < 2e-3


def test_fitted_beats_the_own_solver_on_its_nodes(recorded):
    """On noises that it was not fitted to, and the run that was foretold is the run that is. Mutants: the target a node late,
    coefficients of the prompts' order shuffled, cross-validation on the prompts themselves."""
    pipe = build_pipe("unipc")
    scheduler = erta.fit(pipe, recorded["unipc"], steps=4, batch_size=3)
    report, own = scheduler.report, pipe.scheduler
    assert report["forwards"] == 4 * 4 * 4  # two placements, plain ERTACache, the fit; 4 steps, 4 prompts
    assert report["nodes"] == list(scheduler.solver.nodes)
    assert len(report["predicted"]["psnr_db"]) == 4 and report["predicted"]["mean_psnr_db"] > 20
    mask = tuple(step in scheduler.solver.nodes for step in range(STEPS))
    plain = erta.Plan(mask=(True,) * 4, sigmas=recorded["unipc"].sigmas[[*np.flatnonzero(mask), -1]])
    new = [(MANY[seed % 4], seed) for seed in range(50, 56)]
    uncached = [run(pipe, *one) for one in new]
    with erta.cached(pipe, plain):
        grid = [run(pipe, *one, num_inference_steps=4) for one in new]
    pipe.scheduler = scheduler
    found = [run(pipe, *one, num_inference_steps=4) for one in new]

    def error(runs: list[torch.Tensor]) -> float:
        return float(np.mean([(one - wanted).norm() for one, wanted in zip(runs, uncached, strict=True)]))

    assert error(found) < 0.95 * error(grid)
    again = run(pipe, MANY[2], seed=2, num_inference_steps=4).flatten()[recorded["unipc"].positions].numpy()
    wanted = recorded["unipc"].latents[2, -1]
    relative = np.linalg.norm(again - wanted) / np.linalg.norm(wanted)
    assert relative == pytest.approx(report["on_calibration"]["latent_error"][2], rel=1e-2)
    assert np.median(report["predicted"]["latent_error"]) > np.median(report["on_calibration"]["latent_error"])
    assert own is not pipe.scheduler


def test_budgets(recorded):
    """A speed-up, a PSNR, nodes of one's own; a budget that cannot be, or two at once."""
    pipe = build_pipe("euler")
    trajectories = recorded["euler"]
    options = erta.FitOptions(terms=3, ridge=1e-6, placement="planned", baseline=False)
    assert erta.fit(pipe, trajectories, speedup=2.0, options=options).solver.num_steps == 4
    assert erta.fit(pipe, trajectories, nodes=[0, 3, 5], options=options).solver.nodes == (0, 3, 5)
    least = erta.fit(pipe, trajectories, psnr_db=30.0, options=options)
    assert least.report["predicted"]["median_psnr_db"] >= 30 and least.solver.num_steps < STEPS
    low, high, ran = (
        0,
        STEPS,
        least.solver.num_steps,
    )  # one run a budget that is tried, and one to fit; mutant: two each
    while high - low > 1:
        middle = (low + high) // 2
        ran += middle
        low, high = (low, middle) if middle >= least.solver.num_steps else (middle, high)
    assert least.report["forwards"] == ran * trajectories.num_prompts
    fewer = erta.fit(pipe, trajectories, steps=least.solver.num_steps - 1, options=options)
    assert fewer.report["predicted"]["median_psnr_db"] < 30
    for wrong in (
        {"steps": 0},
        {"steps": STEPS + 1},
        {"steps": 2, "speedup": 2.0},
        {},
        {"nodes": [1, 2]},
        {"nodes": [0, 0]},
    ):
        with pytest.raises(erta.BudgetError):
            erta.fit(pipe, trajectories, **wrong)
    with pytest.raises(erta.BudgetError, match="nothing to save"):
        erta.fit(pipe, trajectories, psnr_db=200.0, options=options)


def test_nodes_are_chosen_by_what_is_predicted(recorded, monkeypatch):
    """Planned ones that mislead are not taken. Mutants: the first placement always, the worst one, the winner's prediction lost,
    a choice without a prediction."""
    pipe, seen = build_pipe("euler"), recorded["euler"]
    assert placed_nodes(seen, 4) == {"planned": nodes_for(seen, 4), "even": (0, 2, 4, 6)}
    assert placed_nodes(seen, STEPS) == {"planned": tuple(range(STEPS))}
    assert placed_nodes(seen, 3, "even") == {"even": (0, 2, 5)}
    second = replace(seen, signature={**seen.signature, "takeover": 3})
    assert all(3 in nodes for nodes in placed_nodes(second, 2).values())
    bad = {"planned": (0, 1, 2, 3), "even": (0, 2, 4, 6)}
    monkeypatch.setattr(fitting, "placed_nodes", lambda *_: bad)
    options = erta.FitOptions(terms=3, ridge=1e-6, baseline=False)
    report = erta.fit(pipe, seen, steps=4, options=options).report
    alone = {name: erta.fit(pipe, seen, nodes=nodes, options=options).report for name, nodes in bad.items()}
    scores = {name: one["predicted"]["mean_psnr_db"] for name, one in alone.items()}
    assert report["nodes"] == [0, 2, 4, 6] and report["predicted"] == alone["even"]["predicted"]
    assert report["predicted_by_placement"] == scores and scores["even"] > scores["planned"] + 1
    assert report["forwards"] == 3 * 4 * 4 and report["placement"] == "even"
    unseen = erta.fit(pipe, seen, steps=4, options=replace(options, validate=False)).report
    assert unseen["nodes"] == [0, 1, 2, 3] and unseen["predicted"] is None
    assert unseen["placement"] == "planned"


def test_nodes_are_refined_by_what_is_predicted(recorded, monkeypatch):
    """Moved where prompts that were left out gain. Mutants: judged by the prompts that were fitted, nodes moved and their old
    prediction kept, the search for nothing."""
    pipe, seen = build_pipe("euler"), recorded["euler"]
    monkeypatch.setattr(fitting, "placed_nodes", lambda *_: {"planned": (0, 1, 2)})
    options = erta.FitOptions(terms=3, ridge=1e-6, baseline=False, placement="planned")
    before = erta.fit(pipe, seen, steps=3, options=options).report
    after = erta.fit(pipe, seen, steps=3, options=replace(options, refine=12)).report
    assert after["placement"] == "refined" and after["nodes"] != before["nodes"]
    alone = erta.fit(pipe, seen, nodes=after["nodes"], options=options).report
    assert after["predicted"] == alone["predicted"]
    gained = after["predicted"]["mean_psnr_db"] - before["predicted"]["mean_psnr_db"]
    assert gained > 0 and after["predicted_by_placement"]["refined"] == alone["predicted"]["mean_psnr_db"]
    tried = after["forwards"] // (3 * 4) - 2  # beside the first prediction and the fit
    assert 1 <= tried <= 12
    with pytest.raises(erta.ErtaError, match="refine moves nodes by cross-validation"):
        erta.fit(pipe, seen, steps=3, options=replace(options, refine=1, validate=False))
    with pytest.raises(erta.ErtaError, match="refine must be"):
        erta.FitOptions(refine=-1)


def test_local_errors_can_be_weighted(recorded):
    """Mutants: weights dropped on the way; a weight for each node; zeros, which make a step free."""
    seen = recorded["euler"]
    late = np.where(np.arange(STEPS) < 5, 1.0, 1e6)
    chosen = nodes_for(seen, 4, weights=late)
    assert chosen == (0, 5, 6, 7) and chosen != nodes_for(seen, 4)
    assert placed_nodes(seen, 4, "planned", weights=late) == {"planned": chosen}
    fitted = erta.fit(build_pipe("euler"), seen, steps=4, options=replace(ONE_RUN, step_weights=late, validate=False))
    assert fitted.solver.nodes == chosen
    for wrong in (late[1:], 0 * late, np.nan * late):
        with pytest.raises(erta.ErtaError, match="step_weights must be 8 positive numbers"):
            nodes_for(seen, 4, weights=wrong)


def test_plain_ertacache_is_read_off_the_trajectories():
    """Without guidance it is the plan of a calibration on the same prompts. Mutants: the residual's change over the cached
    residual, phi over the residual, gains of another step, the grid not moved."""
    pipe, call = build_pipe("unipc"), {**CALL, "guidance_scale": 1.0}
    seen = erta.record(pipe, MANY, decode=False, **call)
    wanted = erta.collapse(pipe, erta.calibrate(pipe, MANY, **call).plan(steps=4)).solver
    found = ertacache_scheduler(pipe.scheduler, seen, 4).solver
    assert found.nodes == wanted.nodes and found.velocity.shape == wanted.velocity.shape
    for name in ("sigmas", "velocity", "latent", "offset"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=2e-3)
    assert not np.allclose(found.sigmas[1:-1], seen.sigmas[list(found.nodes)[1:]])
    few = replace(seen, positions=seen.positions[:9], channels=seen.channels[:9])
    few = replace(few, latents=seen.latents[:, :, :9], outputs=seen.outputs[:, :, :9])
    assert ertacache_scheduler(pipe.scheduler, few, 4).solver.velocity.shape[2] == 1  # channels that were not seen
    change, ratio = residual_changes(replace(seen, signature={**seen.signature, "takeover": 3}))
    assert np.isnan(change[3, 0]) and np.isnan(ratio[4, 1]) and np.isfinite(change[4, 0]) and np.isfinite(change[2, 1])


def test_a_budget_below_plain_ertacache_says_so(recorded):
    """Nodes that are crowded early are; the budget's own are not. Mutants: the comparison turned round, ERTACache at another
    budget, one history for all calls."""
    pipe, seen = build_pipe("euler"), recorded["euler"]
    with pytest.warns(UserWarning, match=r"^4 of 8 steps: .* plain ERTACache \(PSNR, .*: use that, or more steps$"):
        early = erta.fit(pipe, seen, nodes=[0, 1, 2, 3]).report
    assert early["warning"].startswith("4 of 8 steps: ")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain ERTACache")
        usual = erta.fit(pipe, seen, steps=4, batch_size=3).report
        silent = erta.fit(pipe, seen, nodes=[0, 1, 2, 3], options=replace(ONE_RUN, terms=3, ridge=1e-6)).report
    assert usual["warning"] is None is silent["warning"] is silent["predicted_ertacache"]
    assert silent["predicted_ertacache"] is None and silent["forwards"] == 2 * 4 * 4
    theirs = usual["predicted_ertacache"]["psnr_db"]
    assert early["predicted_ertacache"]["psnr_db"] == pytest.approx(theirs, abs=0.01)
    assert early["predicted"]["mean_psnr_db"] < np.mean(theirs) < usual["predicted"]["mean_psnr_db"]
    pipe.scheduler = ertacache_scheduler(pipe.scheduler, seen, 4)
    found = run(pipe, MANY[2], seed=2, num_inference_steps=4).flatten()[seen.positions].numpy()
    wanted = seen.latents[2, -1]
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(usual["predicted_ertacache"]["latent_error"][2], rel=1e-3)


def test_open_loop_and_the_best_of_both(recorded):
    pipe = build_pipe("unipc")
    found = {
        loop: erta.fit(pipe, recorded["unipc"], steps=3, options=replace(ONE_RUN, loop=loop, terms=3, ridge=1e-6))
        for loop in ("open", "closed", "best")
    }
    scores = found["best"].report["predicted_by_loop"]
    assert found["best"].report["loop"] == max(scores, key=scores.get)
    assert scores == {
        loop: pytest.approx(found[loop].report["predicted_by_loop"][loop], abs=1e-3) for loop in ("open", "closed")
    }
    assert not np.allclose(found["open"].solver.velocity, found["closed"].solver.velocity)
    assert found["open"].report["forwards"] == 3 * 4  # the run that foretells; the fit itself costs none


def test_singular_fits(recorded):
    """One prompt, the same twice, latents that do not move: a finite solver each time, and no prediction from one prompt."""
    pipe = build_pipe("unipc")
    assert erta.fit(pipe, recorded["unipc"], steps=1).solver.nodes == (0,)
    one = recorded["unipc"].only([0])
    alone = erta.fit(pipe, one, steps=3)
    assert alone.report["predicted"] is None and np.isfinite(alone.solver.velocity).all()
    twice = erta.fit(pipe, one.merge(one), steps=3)
    assert np.isfinite(twice.solver.velocity).all()
    still = replace(
        recorded["unipc"], latents=np.ones_like(one.latents).repeat(4, 0), outputs=0 * recorded["unipc"].outputs
    )
    assert len(nodes_for(still, 3)) == 3
    products = least_squares.products_of(np.zeros((2, 9)), np.zeros((2, 6, 9)))
    assert not least_squares.solve(products, np.ones(6), range(6), 1e-6).any()


def test_what_does_not_fit_is_refused(recorded):
    pipe, trajectories = build_pipe("unipc"), recorded["unipc"]
    with pytest.raises(erta.SignatureMismatch, match="scheduler"):
        erta.fit(pipe, recorded["euler"], steps=3)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2)
    with pytest.raises(erta.SignatureMismatch, match="weights"):
        erta.fit(pipe, trajectories, steps=3)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(torch.nan)
    nowhere = {**trajectories.signature, "weights": None}
    with pytest.raises(erta.NonFiniteError, match="node 0 of 3"):
        erta.fit(pipe, replace(trajectories, signature=nowhere), steps=3)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(erta.NonFiniteError, match="none is left"):
        erta.record(pipe, PROMPTS[0], **CALL)
    with pytest.raises(erta.ErtaError, match="CogVideoXDDIMScheduler does not integrate over sigmas"):
        pipe.scheduler = CogVideoXDDIMScheduler()
        erta.record(pipe, PROMPTS, **CALL)
    pipe.scheduler = build_pipe("unipc").scheduler
    for wrong in ({"loop": "half"}, {"terms": 7}, {"ridge": -1.0}, {"placement": "odd"}):
        with pytest.raises(erta.ErtaError):
            erta.FitOptions(**wrong)
    assert pipe.scheduler.__class__.__name__ == "UniPCMultistepScheduler"


def test_calls_in_step_end_together(recorded):
    """An exception in one call, or in the answer, ends all of them and reaches the caller. Mutant: threads that wait for ever."""
    pipe = build_pipe("unipc")
    frame = erta.fit(pipe, recorded["unipc"], steps=3, options=erta.FitOptions(validate=False))
    order = []

    def call(name: str, fail_at: int | None = None) -> dict:
        def look(pipe, step, timestep, values):
            order.append((name, step))
            if step == fail_at:
                raise KeyError("of the user's callback")
            return {}

        return {
            "prompt": PROMPTS[0],
            "output_type": "latent",
            "callback_on_step_end": look,
            **CALL,
            "num_inference_steps": 3,
        }

    def answer(node, asked):
        return [one.latent + node for one in asked]

    made = run_in_step(pipe, frame, [call("a"), call("b")], answer)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)] and len(made) == 2
    with pytest.raises(KeyError, match="of the user"):
        run_in_step(pipe, frame, [call("a"), call("b", fail_at=1)], answer)
    with pytest.raises(ZeroDivisionError):
        run_in_step(pipe, frame, [call("a"), call("b")], lambda node, asked: [1 / node])
    assert pipe.scheduler.__class__.__name__ == "UniPCMultistepScheduler"
    assert torch.equal(run(pipe), run(build_pipe("unipc")))
