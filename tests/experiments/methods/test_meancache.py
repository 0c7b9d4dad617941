"""MeanCache, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import erta
from erta.online import Call
from experiments.harness.setup import Setup
from experiments.methods import meancache
from experiments.methods.common.searched import TrajectoryRecorder
from experiments.methods.meancache import MeanCache, path_costs
from tests.commands import config


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


def test_true_guidance_combines_the_branches(monkeypatch):
    """Mutants: the embedded scale in its place; searches of one true scale that serve another."""
    told = [
        "model=flux_tiny",
        "cache=meancache",
        "model.num_inference_steps=4",
        "cache.steps=3",
        "model.guidance_scale=1",
    ]
    setup = Setup(config(*told, "model.true_cfg_scale=4"))
    seen = []
    monkeypatch.setattr(meancache, "MeanCache", lambda mask, sigmas, scale: seen.append(scale))
    monkeypatch.setattr(meancache, "kept", lambda *_: {"costs": np.ones((4, 5)).tolist()})
    meancache.arm(setup)
    assert seen == [4.0]
    assert (
        setup.signature["true_cfg_scale"]
        == 4.0
        != Setup(config(*told, "model.true_cfg_scale=9")).signature["true_cfg_scale"]
    )
