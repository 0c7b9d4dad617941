"""Calibration statistics against a direct computation from stored trajectories, and what is planned from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import erta
from erta.calibration import Calibration
from erta.statistics import TrajectoryObserver
from tests.conftest import CALL, PROMPTS, STEPS, build_pipe

WINDOW = 6


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
    observer = TrajectoryObserver(2, None)
    torch.manual_seed(0)
    for step in range(3):
        observer.observe(step, "cond", torch.randn(1, 20, 2, 4, 4), torch.randn(1, 16, 2, 4, 4))
    assert observer.latent_shape == (20, 2, 4, 4)
    assert observer.finish(3).moments.count.shape == (1, 3, 2, 16)


def test_bad_calls(pipe):
    with pytest.raises(erta.ErtaError, match="at least one prompt"):
        erta.calibrate(pipe, [], **CALL)
    with pytest.raises(erta.ErtaError, match="one sample per prompt"):
        erta.calibrate(pipe, PROMPTS, num_videos_per_prompt=2, **CALL)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(erta.ErtaError, match=r"prompt 1 .*not finite at step 0"):
        erta.calibrate(pipe, PROMPTS, **CALL)
    assert "forward" not in pipe.transformer.__dict__


def test_guidance_off_has_one_branch(pipe):
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=3, **{**CALL, "guidance_scale": 1.0})
    assert calibration.signature["branches"] == ["cond"]
    with erta.cached(pipe, calibration.plan(steps=4)) as trace:
        pipe(prompt=PROMPTS[0], output_type="latent", **{**CALL, "guidance_scale": 1.0})
    assert trace.forwards == {"cond": 4}
