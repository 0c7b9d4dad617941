"""SenCache, by hand."""

from __future__ import annotations

import pytest
import torch

import erta
from erta.online import Call
from experiments.methods.sencache import SenCache, SensitivityRecorder
from tests.experiments.methods.test_dicache import call_at


def test_sencache_by_hand():
    """J = (2, 10) at even steps, (4, 0) at odd ones; epsilon 1, first 0.1, at most 3 in a row; 10 steps.

    step 1: first fifth, source 0: 2 · 0.04 + 10 · 0.001 = 0.09 < 0.1: reused
    step 2: source 0: 2 · 0.4 + 10 · 0.019 = 0.99 < 1: reused
    step 3: source 0: 2 · 0.5 + 10 · 0.01 = 1.1, not below 1: computed
    steps 4, 5, 6: source 3, J = (4, 0): 4 · 0.1: reused         step 7: the fourth in a row: computed
    step 8: source 7: 4 · 0.4 = 1.6: computed                  step 9: the last

    Mutants: the table of this step instead of the source's, the input's change since the step before, time left out,
    the early bound for all steps, a run of four.
    """
    table = {"cond": [(2.0, 10.0), (4.0, 0.0)] * 5}
    xs = [0, 0.04, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6, 1.0, 1.0]
    times = [500, 499, 481, 490, 400, 300, 200, 100, 50, 25]
    rule, made = SenCache(1.0, 3, 0.1, table), []
    rule.begin(10)
    for step, (x, time) in enumerate(zip(xs, times, strict=True)):
        call = call_at(step, x, time, 10)
        made.append(step == 0 or rule.should_compute(call))
        if made[-1]:
            rule.computed(call, call.x, call.x)
    assert made == [True, False, False, True, False, False, False, True, True, True]
    with pytest.raises(erta.ErtaError, match="for 10 steps, not 8"):
        rule.begin(8)
    rule = SenCache(
        0.5, 3, None, table
    )  # no other bound in the first fifth: 0.09 and 0.1 · 2 + 0.2 = 0.4 are below 0.5
    rule.begin(10)
    rule.computed(call_at(0, 0, 500, 10), torch.zeros(1), torch.zeros(1))
    assert not rule.should_compute(call_at(1, 0.1, 480, 10))


def test_sensitivities_of_a_linear_model():
    """v = 3 x + 7 t (t in 0 … 1): J_x = 3, J_t = 7. Mutants: not divided by the step, timesteps for times."""

    def forward(hidden_states, timestep):
        return (3 * hidden_states + 7 * timestep / 1000,)

    recorder = SensitivityRecorder()
    recorder.begin(4)
    x = torch.randn(1, 4, 8)
    kwargs = {"hidden_states": x, "timestep": torch.tensor([400.0])}
    call = Call(0, 4, "cond", x, torch.nn.Identity(), (), kwargs, forward)
    recorder.computed(call, forward(**kwargs)[0], x)
    assert recorder.table["cond"][0] == pytest.approx((3, 7), rel=1e-3)
