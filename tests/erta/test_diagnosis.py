"""The error split adds up, says where the error is, and the closed-loop fit sees the cached trajectory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import erta
from tests.pipelines import CALL, PROMPTS, SOLVERS, STEPS, build_pipe, run

MASK = (True, True, False, True, False, False, True, False)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("variant", ["bare", "full"])
def test_parts_add_up_to_what_was_measured(solver, variant, calibrations):
    """Mutants: a part left out, the nominal grid for all, v at the uncached input for v at the cached one."""
    pipe, full = build_pipe(solver), variant == "full"
    plan = calibrations[solver].plan(steps=4, adjust_time=full, rectify=full)
    split = erta.decompose(pipe, plan, PROMPTS[0], seed=3, **CALL)
    assert split.total_norm > 0.1 and split.closure < 2e-5
    assert sum(split.shares.values()) == pytest.approx(1, abs=1e-4)
    assert (split.norms["grid"] > 1e-3) == full
    assert split.injected_by_step.sum() == pytest.approx(split.shares["injected"], abs=1e-4)
    assert split.propagated_by_step.sum() == pytest.approx(split.shares["propagated"], abs=1e-4)
    computed = np.array(plan.mask)
    assert (split.injected_by_step[computed] == 0).all() and (split.injected_by_step[~computed] != 0).all()
    before_the_first_reuse = computed.argmin() + 1
    assert split.propagated_by_step[:before_the_first_reuse] == pytest.approx(0, abs=1e-5) or full
    assert abs(split.open_loop_norm - split.total_norm) > 1e-3 * split.total_norm  # another quantity
    assert "forward" not in pipe.transformer.__dict__ and "step" not in pipe.scheduler.__dict__


@torch.no_grad()
def test_injected_is_the_sum_of_weighted_errors_under_euler(calibrations):
    """The paper's Eq. 11 on the cached trajectory, by hand: sum of dt (u - v(xc))."""
    pipe = build_pipe("euler")
    plan = calibrations["euler"].plan(steps=4, adjust_time=False, rectify=False)
    split = erta.decompose(pipe, plan, PROMPTS[0], seed=3, **CALL)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    with erta.cached(pipe, plan):
        pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    handle.remove()
    injected = torch.zeros(())
    for step, dt in enumerate(np.diff(plan.sigmas).tolist()):
        if not plan.mask[step]:
            errors = [used - pipe.transformer(**kwargs)[0] for kwargs, used in seen[2 * step : 2 * step + 2]]
            guided = errors[1] + CALL["guidance_scale"] * (errors[0] - errors[1])
            injected = injected + dt * guided
    assert split.norms["injected"] == pytest.approx(float(injected.norm()), rel=1e-4)


def test_nothing_reused_has_no_error(pipe, calibrations):
    split = erta.decompose(pipe, calibrations["unipc"].plan(steps=STEPS), PROMPTS[0], **CALL)
    assert split.total_norm == 0 and set(split.norms.values()) == {0.0}


def test_blocks_site_is_split_alike():
    pipe = build_pipe()
    plan = erta.calibrate(pipe, PROMPTS[:1], site="blocks", window=6, **CALL).plan(steps=4)
    split = erta.decompose(pipe, plan, PROMPTS[1], seed=1, **CALL)
    assert split.closure < 2e-5 and split.norms["injected"] > 0


def test_propagation_gain(pipe):
    """An error after the last step is the error at the end; earlier ones pass through the model.

    Mutants: the same direction twice; another direction where only one is asked for.
    """
    gains = erta.propagation_gain(pipe, PROMPTS[0], [0, 4, STEPS - 1], directions=2, **CALL)
    assert gains.shape == (3, 2) and gains[-1] == pytest.approx(1, rel=1e-3) and np.isfinite(gains).all()
    assert (abs(gains[0] - 1) > 1e-3).all() and gains[0, 0] != gains[0, 1]
    alone = erta.propagation_gain(pipe, PROMPTS[0], [4], **CALL)
    assert alone == pytest.approx(gains[1:2, :1])
    with pytest.raises(erta.ErtaError, match=f"no step {STEPS}"):
        erta.propagation_gain(pipe, PROMPTS[0], [STEPS], **CALL)


def test_errors_in_the_noise_and_along_the_trajectory():
    """In the noise: another noise's run, by hand. Along: the last move, one direction. Mutants: the move after for the one
    before, an error after step 0 for one in the noise."""
    pipe = build_pipe("euler")
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    seen = []

    def keep(pipe, step, timestep, values):
        seen.append(values["latents"])
        return {}

    end = run(pipe, callback_on_step_end=keep)
    move = seen[0] - noise
    error = 1e-3 * noise.norm() * move / move.norm()
    grown = (run(pipe, latents=noise + error) - end).norm() / error.norm()
    gains = erta.propagation_gain(pipe, PROMPTS[0], [-1, 0, STEPS - 1], seed=3, along=True, **CALL)
    assert gains.shape == (3, 1) and gains[0, 0] == pytest.approx(float(grown), rel=1e-2)
    assert gains[2, 0] == pytest.approx(1, rel=1e-3) and gains[0, 0] != pytest.approx(gains[1, 0], rel=1e-3)


def test_decompose_checks_the_call(pipe, calibrations):
    with pytest.raises(erta.SignatureMismatch, match="num_inference_steps"):
        erta.decompose(pipe, calibrations["unipc"].plan(steps=4), PROMPTS[0], **{**CALL, "num_inference_steps": 5})


def test_closed_loop_fit_sees_the_cached_trajectory(calibrations):
    """Until the first reuse both trajectories are one, so the first fit agrees; later ones do not. Mutant: open loop."""
    pipe, calibration = build_pipe(), calibrations["unipc"]
    plan = calibration.plan(steps=4, adjust_time=False, rectify=False)
    refitted = erta.refit(pipe, plan, PROMPTS, **CALL)
    reused = [step for step, computed in enumerate(plan.mask) if not computed]
    opened, closed = calibration.rectification(plan.mask), refitted.rectification
    np.testing.assert_allclose(closed.gain[reused[0]], opened.gain[reused[0]], rtol=1e-3, atol=1e-4)
    assert np.abs(closed.gain[reused[-1]] - opened.gain[reused[-1]]).max() > 1e-3
    computed = np.array(plan.mask)
    assert (closed.gain[computed] == 1).all() and (closed.offset[computed] == 0).all()
    assert refitted.mask == plan.mask and "closed loop" in refitted.report["rectifier"]
    for value, was_computed in zip(refitted.report["rectifier_r2"], plan.mask, strict=True):
        assert value is None if was_computed else 0 <= value <= 1
    assert erta.refit(pipe, plan, PROMPTS[:1], rectifier="scalar", **CALL).rectification.gain.shape == (STEPS, 2, 1)


def test_bad_refits(pipe, calibrations):
    with pytest.raises(erta.ErtaError, match="at least one prompt"):
        erta.refit(pipe, calibrations["unipc"].plan(steps=4), [], **CALL)
    with pytest.raises(erta.ErtaError, match="rectifier must be"):
        erta.refit(pipe, calibrations["unipc"].plan(steps=4), PROMPTS, rectifier="matrix", **CALL)
    with pytest.raises(erta.ErtaError, match="reused steps"):
        erta.refit(pipe, calibrations["unipc"].plan(steps=STEPS), PROMPTS, **CALL)
