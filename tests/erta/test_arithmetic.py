"""Arithmetic by hand: integer timesteps of a moved grid, what vanishes between steps, the hook's own time."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

import erta
from erta import hooks
from erta.interpolation import interpolate
from erta.scheduler import nominal_sigmas, write_grid
from tests.pipelines import CALL, build_pipe


def test_integer_timesteps_are_floored():
    """UniPC's own are: sigma 0.9996 is timestep 999.

    Mutants: rounding (1000, and 23 of 50 steps of the default run); no allowance for what float32 leaves off.
    """
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    scheduler.set_timesteps(50)
    assert not scheduler.timesteps.dtype.is_floating_point
    own, sigmas = scheduler.timesteps.clone(), nominal_sigmas(scheduler)
    moved = sigmas.copy()
    moved[1:4] = [0.99679, 0.99051, 0.987]
    write_grid(scheduler, moved)
    assert scheduler.timesteps[1:4].tolist() == [996, 990, 987]  # 0.987 is 986.99999 in float32: not 986
    assert torch.equal(scheduler.timesteps[4:], own[4:])
    write_grid(scheduler, np.append(sigmas[:-1] * np.float32(0.999), sigmas[-1]))
    wanted = [int(1000 * float(np.float32(s) * np.float32(0.999)) + 1e-4) for s in sigmas[:-1]]
    assert scheduler.timesteps.tolist() == wanted


def test_what_vanishes_at_equal_steps(calibrations):
    """Halfway between two steps, half of a pair's error moment is left; the velocity's own moments are not halved.

    Mutant: the same for all of them, or for none.
    """
    made = calibrations["euler"]
    sigmas = np.array(made.signature["sigmas"], np.float64)
    middle = np.insert(sigmas, 1, (sigmas[0] + sigmas[1]) / 2)
    ours, moments = interpolate(made, middle).statistics.moments, made.statistics.moments
    # step 1 is halfway from 0 to 1, a pair with step 0 half a step apart: between the pair (0, 0), which is no error, and (0, 1)
    np.testing.assert_allclose(ours.mean_e[:, 1, 0], moments.mean_e[:, 1, 0] / 2)
    share = moments.s_ve[:, 1, 0] / moments.count[:, 1, 0]
    np.testing.assert_allclose(ours.s_ve[:, 1, 0], share / 2)
    own = moments.s_vv[:, 1, 0] / moments.count[:, 1, 0]
    np.testing.assert_allclose(ours.s_vv[:, 1, 0], own)
    np.testing.assert_allclose(ours.mean_v[:, 1, 0], moments.mean_v[:, 1, 0])


def test_the_hooks_own_time(calibrations, monkeypatch):
    """With a clock that moves on by 1 s at each look: a computed step looks 6 times, 1 s of them the forward's own clock.

    entered 1, called 2, start 3, stop 4, inside = 5 - 2 = 3, at the end 6: 6 - 1 - 3 = 2 s of the hook; a reused step: 1 s.
    Mutant: the hook's time counted twice.
    """
    now = [0.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    pipe, plan = build_pipe(), calibrations["unipc"].plan(steps=4)
    with erta.cached(pipe, plan) as trace:
        monkeypatch.setattr(hooks.time, "perf_counter", tick)
        pipe(prompt="a red circle", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL)
        monkeypatch.undo()
    branches = len(trace.executed)
    assert branches == 2 and trace.overhead_s == branches * (4 * 2.0 + 4 * 1.0)
    assert trace.forward_s == branches * 4 * 1.0
