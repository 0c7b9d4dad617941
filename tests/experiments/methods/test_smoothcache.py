"""SmoothCache, by hand."""

from __future__ import annotations

import numpy as np
import torch

from erta.online import Call
from erta.policy import threshold_mask
from experiments.methods.smoothcache import ChangeRecorder


def test_smoothcache_by_hand():
    """Outputs 10, 11, 12, 15 of one module, 10, 10, 10, 10 of another: means of 0.1, 0.2, 0.5 and 0 over 1, 2, 3 steps.

    alpha 0.11: step 1 (0.05) and step 2 (0.1 since step 0) reused, step 3 (0.25) computed.
    Mutants: the change since the step before (step 3: 0.125), divided by the later output, a sum over modules.
    """
    modules = {"mlp": [torch.nn.Identity(), torch.nn.Identity()]}
    recorder = ChangeRecorder(modules)
    recorder.begin(4)
    for step, value in enumerate([10, 11, 12, 15]):
        for module, output in zip(modules["mlp"], (value, 10), strict=True):
            module(torch.full((1, 4), float(output)))
        x = torch.zeros(1)
        recorder.computed(Call(step, 4, "cond", x, torch.nn.Identity()), x, x)
    recorder.close()
    assert not any(module._forward_hooks for module in modules["mlp"])
    profile = recorder.profiles()["mlp"]
    np.testing.assert_allclose(profile[3], [0.125, (4 / 11) / 2, 0.25])
    np.testing.assert_allclose(profile[2, :2], [(1 / 11) / 2, 0.1])
    assert threshold_mask(profile, 0.11) == (True, False, False, True)
    assert threshold_mask(np.zeros((9, 3)), 0.11) == (True, False, False, False) * 2 + (True,)
