"""DiCache and SenCache: decisions by hand, what they run counted, and their way through the harness."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import erta
from erta.online import Call, online
from experiments.peers.dicache import DiCache, probe_share
from experiments.peers.sencache import SenCache, SensitivityRecorder
from experiments.record import read_lines
from tests.conftest import build_pipe
from tests.test_cli import command, folders, weights  # noqa: F401
from tests.test_sites import FLUX_CALL, WAN_CALL, build_flux, generate


def call_at(step: int, x: float, time: float = 0.0, num_steps: int = 8) -> Call:
    kwargs = {"timestep": torch.tensor([time])}
    return Call(step, num_steps, "cond", torch.full((1, 1, 4), float(x)), torch.nn.Identity(), (), kwargs)


def test_dicache_by_hand():
    """delta 0.5, retention 0.25 of 8 steps; block 0's output h, its residual p = h - 10; stack residuals r = 100 + step

    steps 0, 1: retention; h = 20, 30                         p_{-2} = 10, p_{-1} = 20, r = 100, 101
    step 2: h = 36: 6 / 30 = 0.2: reused; gamma = |26 - 10| / |20 - 10| = 1.6, clipped to 1.5: r = 101.5
    step 3: h = 42: + 6 / 36 = 0.367: reused; gamma 1.5
    step 4: h = 49: + 7 / 42 = 0.533 >= 0.5: computed         p_{-2} = 20, p_{-1} = 39, r = 101, 104
    step 5: h = 49: 0: reused; gamma = |39 - 20| / |39 - 20| = 1: r = 104
    step 6: h = 54.7: 5.7 / 49 = 0.1163: reused; gamma = 24.7 / 19 = 1.3: r = 104.9
    step 7: the last: computed

    Mutants: the change against the last computed step, the sum not cleared, the probes' roles exchanged, no clip.
    """
    outputs, made, used = [20, 30, 36, 42, 49, 49, 54.7, 60], [], {}
    rule = DiCache(0.5, 0.25)
    now = {"step": 0}

    def seen(*_):
        h = torch.full((1, 1, 4), float(outputs[now["step"]]))
        return h, h - 10

    rule.site = SimpleNamespace(probe=seen, seen=seen, forget=lambda: None)
    rule.begin(8)
    for step in range(8):
        now["step"] = step
        call = call_at(step, 0)
        made.append(step == 0 or rule.should_compute(call))
        if made[-1]:
            rule.computed(call, call.x, call.x + 100 + step)
        else:
            used[step] = rule.stand_in(call, call.x).mean().item()
    assert made == [True, True, False, False, True, False, False, True]
    assert used == pytest.approx({2: 101.5, 3: 101.5, 5: 104.0, 6: 104.9})


@pytest.mark.parametrize(("build", "call"), [(build_pipe, WAN_CALL), (build_flux, FLUX_CALL)])
def test_dicache_probes_the_first_block_once(build, call):
    """Nothing reused: bit-identical, block 0 run once a step. All reused: block 0 at every step, no other block.

    Mutants: block 0 run again after its probe, the other blocks run by the probe, an earlier probe resumed from.
    """
    pipe = build()
    before = generate(pipe, call)
    stacks = ["blocks"] if build is build_pipe else ["transformer_blocks", "single_transformer_blocks"]
    blocks = [block for name in stacks for block in pipe.transformer.get_submodule(name)]
    counts = [0] * len(blocks)
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    share = probe_share(pipe, call)
    counts[:] = [0] * len(blocks)
    rule = DiCache(0.0, 0.0)
    with online(pipe, rule, rule.on, reuse_share=share) as trace:
        assert torch.equal(generate(pipe, call), before)
    steps, branches = trace.num_steps, len(trace.executed)
    assert counts == [steps * branches] * len(blocks) and not trace.reused_anything()
    counts[:] = [0] * len(blocks)
    rule = DiCache(1e9, 0.0)
    with online(pipe, rule, rule.on, reuse_share=share) as trace:
        generate(pipe, call)
    assert counts == [steps * branches] + [2 * branches] * (len(blocks) - 1)
    assert sum(trace.forwards.values()) == pytest.approx(branches * (2 + share * (steps - 2))) and 0 < share < 1
    assert torch.equal(generate(pipe, call), before)


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


PEERS = {"dicache": ["cache.steps=5"], "sencache": ["cache.steps=4", "cache.options.first=10"]}


@pytest.mark.slow
@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Through the command line: the budget is met on calibration prompts, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", *PEERS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    report = record["plan_report"]
    assert report["computed"] <= report["asked"] + 0.5 and f"{cache}: {report['knob']}=" in printed
    made = [row["cached"]["forwards"] for row in rows]
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and max(made) < 12
    assert record["steps"]["without_reuse"] == 0 and record["memory"]["cache_bytes"] > 0
