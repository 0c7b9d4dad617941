"""Calibration statistics against a direct computation from stored trajectories, and what is planned from them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import erta
from erta.architectures import Architecture
from erta.calibration import Calibration
from erta.coefficients import Coefficients
from erta.interpolation import _Tables
from erta.rectifier import fit_linear
from erta.scheduler import nominal_sigmas
from erta.site import SeenForward, like_output
from erta.statistics import TrajectoryObserver
from tests.pipelines import CALL, PROMPTS, STEPS, build_pipe

WINDOW = 6
ANY = Architecture("any")


@pytest.fixture(scope="module")
def trajectories():
    """x and v of every step, branch and prompt, stored by plain forward hooks."""
    pipe, stored = build_pipe(), []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: stored.append((kwargs["hidden_states"].double(), output[0].double())),
        with_kwargs=True,
    )
    for index, prompt in enumerate(PROMPTS):
        pipe(prompt=prompt, generator=torch.Generator().manual_seed(index), output_type="latent", **CALL)
    x = torch.stack([a for a, _ in stored]).view(len(PROMPTS), STEPS, 2, *stored[0][0].shape[1:])
    v = torch.stack([b for _, b in stored]).view_as(x)
    return x.numpy(), v.numpy()


def test_relative_l1_is_the_ground_truth_form(calibrations, trajectories):
    x, v = trajectories
    r = v - x
    statistics = calibrations["unipc"].statistics.rel_l1
    for step, gap in [(1, 1), (5, 2), (7, 6)]:
        change = np.abs(r[:, step - gap] - r[:, step]).sum((2, 3, 4, 5))
        truth = (change / np.abs(r[:, step]).sum((2, 3, 4, 5))).ravel()
        cached = (change / np.abs(r[:, step - gap]).sum((2, 3, 4, 5))).ravel()
        np.testing.assert_allclose(statistics.mean[0, step, gap - 1], truth.mean(), rtol=1e-5)
        np.testing.assert_allclose(statistics.std()[0, step, gap - 1], truth.std(ddof=1), rtol=1e-4)
        np.testing.assert_allclose(statistics.mean[1, step, gap - 1], cached.mean(), rtol=1e-5)
    assert statistics.count[0, 5, 1] == 2 * len(PROMPTS) and statistics.count[0, 1, 1] == 0


def test_phi_comes_from_the_guided_output(calibrations, trajectories):
    """Mutants: phi of one branch, the wrong denominator, phi after rectification."""
    x, v = trajectories
    guided = v[:, :, 1] + CALL["guidance_scale"] * (v[:, :, 0] - v[:, :, 1])
    r = guided - x[:, :, 0]
    step, gap = 5, 2
    error = np.abs(r[:, step - gap] - r[:, step]).sum((1, 2, 3, 4))
    velocity = (error / np.abs(guided[:, step]).sum((1, 2, 3, 4))).mean()
    increment = (error / np.abs(guided[:, step] - guided[:, step - 1]).sum((1, 2, 3, 4))).mean()
    mask = (True, True, True, True, False, False, True, True)
    calibration = calibrations["unipc"]
    assert calibration.phi(mask)[step] == pytest.approx(np.clip(1 - velocity, 0.01, 1), rel=1e-5)
    assert calibration.phi(mask, "increment")[step] == pytest.approx(np.clip(1 - increment, 0.01, 1), rel=1e-5)
    assert (calibration.phi(mask)[list(mask)] == 1).all()


def test_rectifier_is_the_least_squares_fit(calibrations, trajectories):
    x, v = trajectories
    r = v - x
    mask = (True, True, True, True, False, False, True, True)
    rectification = calibrations["unipc"].rectification(mask)
    for branch, channel in [(0, 0), (1, 7)]:
        cached = (x[:, 5] + r[:, 3])[:, branch, channel].ravel()
        error = (r[:, 3] - r[:, 5])[:, branch, channel].ravel()
        slope, offset = np.polyfit(cached, error, 1)
        np.testing.assert_allclose(rectification.gain[5, branch, channel], 1 - slope, rtol=1e-4)
        np.testing.assert_allclose(rectification.offset[5, branch, channel], -offset, rtol=1e-3, atol=1e-6)
    assert (rectification.gain[list(mask)] == 1).all() and (rectification.offset[list(mask)] == 0).all()


def test_rectified_output_is_what_the_hook_returns(calibrations):
    plan = calibrations["unipc"].plan(steps=4, adjust_time=False)
    pipe, outputs = build_pipe(), []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: outputs.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    with erta.cached(pipe, plan):
        pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **CALL)
    step = plan.mask.index(False)
    for branch in range(2):
        (x0, v0), (x1, v1) = outputs[2 * (step - 1) + branch], outputs[2 * step + branch]
        gain = torch.tensor(plan.rectification.gain[step, branch]).float().view(1, -1, 1, 1, 1)
        offset = torch.tensor(plan.rectification.offset[step, branch]).float().view(1, -1, 1, 1, 1)
        torch.testing.assert_close(v1, gain * (x1 + v0 - x0) + offset)


def test_calibration_does_not_change_the_run():
    pipe = build_pipe()
    seeds = dict(generator=torch.Generator().manual_seed(5), output_type="latent")
    before = pipe(prompt=PROMPTS[0], **seeds, **CALL).frames
    erta.calibrate(pipe, PROMPTS[:1], window=2, **CALL)
    assert "forward" not in pipe.transformer.__dict__
    seeds["generator"].manual_seed(5)
    assert torch.equal(pipe(prompt=PROMPTS[0], **seeds, **CALL).frames, before)


def test_merge_of_shards_equals_one_run(calibrations):
    pipe = build_pipe()
    shards = [erta.calibrate(pipe, [p], window=WINDOW, seed=k, **CALL) for k, p in enumerate(PROMPTS)]
    merged = shards[0].merge(shards[1])
    whole = calibrations["unipc"]
    for name, array in merged.statistics.to_arrays().items():
        np.testing.assert_allclose(array, whole.statistics.to_arrays()[name], rtol=1e-12, atol=1e-12, err_msg=name)
    assert merged.record["prompts"] == PROMPTS


def test_break_even_counts_generations(calibrations):
    """20 s spent, 2 prompts of 4 s in the transformer: half the steps save 2 s a generation."""
    calibration = calibrations["unipc"]
    assert 0 < calibration.record["forward_s"] < calibration.record["seconds"]
    made = Calibration(
        calibration.statistics, calibration.signature, {**calibration.record, "seconds": 20.0, "forward_s": 8.0}
    )
    assert made.break_even(4) == pytest.approx(10) and made.break_even(8) == float("inf")


def test_longer_last_step_is_a_control_for_phi(calibrations):
    """Mutant: the key does nothing."""
    plan = calibrations["unipc"].plan(steps=4, time_form="last_step")
    by_phi = calibrations["unipc"].plan(steps=4)
    assert plan.sigmas[-2] == pytest.approx(by_phi.sigmas[-2]) and plan.sigmas[-2] > plan.nominal_sigmas[-2]
    assert np.ptp(np.diff(plan.sigmas[:-1]) / np.diff(plan.nominal_sigmas[:-1])) < 1e-4  # one factor for all others
    assert np.ptp(np.diff(by_phi.sigmas[:-1]) / np.diff(by_phi.nominal_sigmas[:-1])) > 1e-3
    assert plan.report["time_form"] == "last_step" and plan.mask == by_phi.mask
    with pytest.raises(erta.ErtaError, match="adjust_time, which is off"):
        calibrations["unipc"].plan(steps=4, time_form="last_step", adjust_time=False)
    with pytest.raises(erta.ErtaError, match="time_form"):
        calibrations["unipc"].plan(steps=4, time_form="first_step")


def test_round_trip(tmp_path, calibrations):
    path = tmp_path / "c.safetensors"
    calibrations["unipc"].save(path)
    loaded = Calibration.load(path)
    plan, again = calibrations["unipc"].plan(speedup=2), loaded.plan(speedup=2)
    assert plan.to_json() == again.to_json() and plan.num_computed == 4
    plan.save(tmp_path / "plan.json")
    assert erta.Plan.load(tmp_path / "plan.json").to_json() == plan.to_json()


def test_truncated_or_foreign_files(tmp_path, calibrations):
    path = tmp_path / "c.safetensors"
    calibrations["unipc"].save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(erta.ErtaError, match="cannot read a calibration"):
        Calibration.load(path)
    with pytest.raises(erta.ErtaError, match="cannot read a calibration"):
        Calibration.load(tmp_path / "absent.safetensors")
    (tmp_path / "plan.json").write_text('{"schema": "erta.plan/1", "steps"')
    with pytest.raises(erta.ErtaError, match="cannot read a plan"):
        erta.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one"),
        ({"threshold": 0.1, "steps": 3}, "threshold, steps"),
        ({"threshold": -0.1}, "threshold"),
        ({"speedup": 100}, "largest is 8"),
        ({"steps": 9}, "1 to 8"),
        ({"steps": 4, "policy": "best"}, "policy"),
        ({"steps": 4, "phi_denominator": "x"}, "phi_denominator"),
        ({"steps": 4, "rel_l1_denominator": "x"}, "rel_l1_denominator"),
        ({"steps": 4, "rectifier": "x"}, "rectifier must"),
        ({"steps": 4, "rectifier_form": "x"}, "rectifier_form"),
        ({"steps": 4, "reuse": "velocity"}, "velocity"),
        ({"threshold": 0.1, "policy": "uniform"}, "no threshold"),
        ({"steps": 1, "policy": "uniform"}, "window"),
    ],
)
def test_bad_plans(calibrations, kwargs, message):
    with pytest.raises(erta.ErtaError, match=message):
        calibrations["unipc"].plan(**kwargs)


def test_a_threshold_that_reuses_nothing_is_said(calibrations):
    with pytest.warns(UserWarning, match="reuses nothing"):
        assert all(calibrations["unipc"].plan(threshold=1e-9).mask)


def test_extra_input_channels_belong_to_the_shape_but_not_to_the_residual():
    """Image-to-video models append channels to the latent: the first ones answer to the output."""
    observer = TrajectoryObserver(2, None, ANY)
    torch.manual_seed(0)
    for step in range(3):
        x, v = torch.randn(1, 20, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
        residual = v - like_output(x, v, ANY)
        observer.observe(SeenForward(step, "cond", x, v, residual, lambda r, x=x, v=v: like_output(x, v, ANY) + r))
    assert observer.latent_shape == (20, 2, 4, 4)
    assert observer.finish(3).moments.count.shape == (1, 3, 2, 16)


def test_both_branches_in_one_batch_give_the_statistics_of_two_passes():
    """CogVideoX and LTX run [uncond, cond] as one batch. Mutants: halves swapped, one branch for both."""
    torch.manual_seed(0)
    apart, together = (TrajectoryObserver(3, 4.0, ANY) for _ in range(2))
    for step in range(5):
        x, v = torch.randn(1, 16, 2, 4, 4), {name: torch.randn(1, 16, 2, 4, 4) for name in ("uncond", "cond")}
        for name in v:
            apart.observe(SeenForward(step, name, x, v[name], v[name] - x, lambda r, x=x: x + r))
        both, x2 = torch.cat(list(v.values())), torch.cat([x, x])
        together.observe(SeenForward(step, "cond_uncond", x2, both, both - x2, lambda r, x=x2: x + r))
    assert together.branches == apart.branches == ["uncond", "cond"]
    ours, wanted = together.finish(5).to_arrays(), apart.finish(5).to_arrays()
    for name, array in wanted.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-6, atol=1e-9, err_msg=name)


def test_calibration_holds_its_window_and_no_trajectory():
    """Latents alive after many steps, by weak references: `window` residuals and the last guided output a branch."""
    observer, alive = TrajectoryObserver(3, None, ANY), []
    for step in range(10):
        x, v = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
        r = v - x
        alive += [weakref.ref(tensor) for tensor in (x, v, r)]
        observer.observe(SeenForward(step, "cond", x, v, r, lambda old, x=x: x + old))
        del x, v, r
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 3 + 2 + 2  # and the step that is still open


def test_policy_denominators_differ(calibrations):
    calibration = calibrations["unipc"]
    truth, cached = (calibration.rel_l1(name) for name in ("ground_truth", "cached"))
    assert np.isfinite(truth[3, :3]).all() and not np.allclose(truth[3, :3], cached[3, :3])
    assert calibration.plan(steps=4, rel_l1_denominator="cached").report["rel_l1_denominator"] == "cached"


def test_scalar_rectifier_is_the_fit_over_all_channels(calibrations, trajectories):
    x, v = trajectories
    r = v - x
    mask = (True, True, True, True, False, False, True, True)
    rectification = calibrations["unipc"].rectification(mask, "scalar")
    slope, offset = np.polyfit((x[:, 5] + r[:, 3])[:, 0].ravel(), (r[:, 3] - r[:, 5])[:, 0].ravel(), 1)
    np.testing.assert_allclose(rectification.gain[5, 0], 1 - slope, rtol=1e-4)
    np.testing.assert_allclose(rectification.offset[5, 0], -offset, rtol=1e-3, atol=1e-6)
    pooled = fit_linear(calibrations["unipc"].statistics.moments.pooled())
    by_channel = fit_linear(calibrations["unipc"].statistics.moments)
    assert pooled.r2[0, 5, 1, 0] < by_channel.r2[0, 5, 1].max()


def test_literal_sigmoid_is_the_papers_formula(calibrations):
    """K and B as the paper prints them; near sigmoid's centre it is the linear form, elsewhere biased."""
    plan = calibrations["unipc"].plan(steps=4, adjust_time=False, rectifier_form="sigmoid")
    step = plan.mask.index(False)
    gap = step - max(k for k in range(step) if plan.mask[k])
    moments = calibrations["unipc"].statistics.moments
    branch = calibrations["unipc"].signature["branches"].index("cond")
    s_ve, s_vv, mean_v, mean_e = (
        torch.tensor(getattr(moments, name)[branch, step, gap - 1]).float().view(1, -1, 1, 1, 1)
        for name in ("s_ve", "s_vv", "mean_v", "mean_e")
    )
    k = 4 * s_ve / s_vv
    b = 4 * (mean_e - 0.5) - k * mean_v
    v = torch.randn(1, 16, 2, 4, 4)
    found = Coefficients(plan, ANY).rectify(v, step, "cond")
    torch.testing.assert_close(found, v - torch.sigmoid(k * v + b), rtol=1e-4, atol=1e-4)
    linear = Coefficients(calibrations["unipc"].plan(steps=4, adjust_time=False), ANY).rectify(v, step, "cond")
    assert (found - linear).abs().max() > 0.01


def test_rectification_of_both_branches_in_one_batch(calibrations):
    coefficients = Coefficients(calibrations["unipc"].plan(steps=4), ANY)
    step, v = coefficients.plan.mask.index(False), torch.randn(4, 16, 2, 4, 4)
    both = coefficients.rectify(v, step, "cond_uncond")
    torch.testing.assert_close(both[:2], coefficients.rectify(v[:2], step, "uncond"))
    torch.testing.assert_close(both[2:], coefficients.rectify(v[2:], step, "cond"))
    assert (both[2:] - coefficients.rectify(v[2:], step, "uncond")).abs().max() > 1e-4


def test_interpolation_gives_back_what_is_known(calibrations):
    """On its own grid nothing changes; on every second sigma, pairs are those of twice the gap. Mutants: c for i."""
    calibration = calibrations["unipc"]
    sigmas = np.array(calibration.signature["sigmas"], np.float32)
    same = erta.interpolate(calibration, sigmas)
    mask = (True, True, True, False, False, True, False, True)
    np.testing.assert_allclose(same.rel_l1(), calibration.rel_l1(), rtol=1e-9)
    np.testing.assert_allclose(same.phi(mask), calibration.phi(mask), rtol=1e-9)
    for name in ("gain", "offset"):
        np.testing.assert_allclose(
            getattr(same.rectification(mask), name),
            getattr(calibration.rectification(mask), name),
            rtol=1e-6,
            atol=1e-9,
        )
    half = erta.interpolate(calibration, np.append(sigmas[:-1:2], sigmas[-1]))
    np.testing.assert_allclose(half.rel_l1()[3, :3], calibration.rel_l1()[6, 1:6:2], rtol=1e-9)
    assert np.isnan(half.rel_l1()[1, 1:]).all() and half.num_steps == STEPS // 2
    between = erta.interpolate(calibration, np.append(np.linspace(sigmas[0], sigmas[-2], 11), 0)).rel_l1()[5, :3]
    assert (np.diff(between) > 0).all() and between[0] < calibration.rel_l1()[4, 0]


def test_interpolation_to_a_finer_grid_is_linear():
    """Closed form: statistics that grow with the distance of two steps come back as the distance of their places.

    Mutant: the same sign for a pair that is looked up the other way round.
    """
    steps, window = 8, 6
    gaps = np.broadcast_to(np.arange(1.0, window + 1), (steps, window))
    places = np.array([0.0, 0.4, 0.8, 1.4, 1.6, 2.5, 3.7, 6.1, 7.0])
    tables = _Tables(places, window)
    found = tables.carry(gaps, axis=0)
    for step, gap in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3), (7, 2), (8, 1)]:
        assert found[step, gap - 1] == pytest.approx(places[step] - places[step - gap]), (step, gap)
    assert not tables.known[8, 5] and not tables.known[1, 1]  # farther apart than the window; before the first step


def test_interpolated_plan_runs_and_says_so(calibrations):
    pipe = build_pipe()
    pipe.scheduler.set_timesteps(6)
    plan = erta.interpolate(calibrations["unipc"], nominal_sigmas(pipe.scheduler)).plan(steps=3)
    assert plan.report["interpolated_from_steps"] == STEPS
    generations = erta.interpolate(calibrations["unipc"], nominal_sigmas(pipe.scheduler)).break_even(3)
    assert generations == pytest.approx(calibrations["unipc"].break_even(STEPS // 2) * STEPS / 6)
    with erta.cached(pipe, plan) as trace:
        pipe(prompt=PROMPTS[0], output_type="latent", **{**CALL, "num_inference_steps": 6})
    assert trace.forwards == {"cond": 3, "uncond": 3}
    with pytest.raises(erta.ErtaError, match="phi by increment"):
        erta.interpolate(calibrations["unipc"], nominal_sigmas(pipe.scheduler)).plan(
            steps=3, phi_denominator="increment"
        )
    with pytest.raises(erta.ErtaError, match="not extrapolated"):
        erta.interpolate(calibrations["unipc"], np.array([1.0, 0.5, 1e-4, 0.0]))


def test_bad_calls(pipe):
    with pytest.raises(erta.ErtaError, match="at least one prompt"):
        erta.calibrate(pipe, [], **CALL)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(erta.ErtaError, match="no prompt is left"), pytest.warns(UserWarning, match="prompt 1 "):
        erta.calibrate(pipe, PROMPTS, **CALL)
    assert "forward" not in pipe.transformer.__dict__


@pytest.mark.parametrize("bad", [0, 1])
def test_a_prompt_that_is_not_finite_is_named_and_left_out(pipe, bad):
    """Mutant: the NaN reaches the statistics, or the good prompt is lost with the bad one."""
    steps, forwards = STEPS * 2, []

    def spoil(module, args, output):
        forwards.append(1)
        return output * float("nan") if len(forwards) == steps * bad + 7 else output

    handle = pipe.transformer.proj_out.register_forward_hook(spoil)
    seen: list[int] = []
    with pytest.warns(UserWarning, match=rf"prompt {bad + 1} .*not finite at step 3; it is left out"):
        calibration = erta.calibrate(pipe, PROMPTS, window=6, on_prompt=lambda k, c: seen.append(k), **CALL)
    handle.remove()
    assert calibration.record["prompts"] == [PROMPTS[1 - bad]] and calibration.record["skipped"] == [PROMPTS[bad]]
    alone = erta.calibrate(pipe, [PROMPTS[1 - bad]], window=6, seed=1 - bad, **CALL)
    np.testing.assert_allclose(calibration.rel_l1(), alone.rel_l1(), rtol=1e-6)
    assert seen == ([0, 1] if bad else [1])


def test_guidance_off_has_one_branch(pipe):
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=3, **{**CALL, "guidance_scale": 1.0})
    assert calibration.signature["branches"] == ["cond"]
    with erta.cached(pipe, calibration.plan(steps=4)) as trace:
        pipe(prompt=PROMPTS[0], output_type="latent", **{**CALL, "guidance_scale": 1.0})
    assert trace.forwards == {"cond": 4}


def test_a_plan_of_the_first_version_is_read():
    """A file as the first version wrote it. Mutant: a field that it did not know asked for."""
    plan = erta.Plan.load(Path(__file__).with_name("plan_of_the_first_version.json"))
    assert (plan.num_steps, plan.num_computed, plan.site, plan.takeover) == (6, 3, "output", None)
    assert plan.rectification.gain.shape == (6, 2, 16) and plan.report["policy"] == "threshold"
