"""Caches of single modules: schedules by hand, what is left out counted, and their way through the harness."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from diffusers.hooks.hooks import StateManager

import erta
from erta.online import Call
from erta.schedule import threshold_mask
from erta.scheduler import step_index
from erta.site import latent_of
from experiments.peers import t_gate
from experiments.peers.counting import forward_costs
from experiments.peers.delta_dit import DeltaHook, _RangeState, blocks_of, schedule
from experiments.peers.modules import components_of, every, hooked, module_cache
from experiments.peers.smoothcache import ChangeRecorder
from experiments.record import read_lines
from tests.conftest import CALL, build_pipe, run
from tests.test_cli import command, folders, weights  # noqa: F401
from tests.test_peer_counting import wan_cost
from tests.test_sites import FLUX_CALL, WAN_CALL, build_flux, generate


def test_modules_run_where_the_schedule_says():
    """Feed-forward at steps 0, 3 and 6, cross-attention at step 0, in both branches alike; taken off without a trace.

    Mutants: one output for both guidance branches, cross and self exchanged, state kept between calls.
    """
    pipe = build_pipe()
    before, costs = run(pipe), forward_costs(pipe, CALL)
    with module_cache(pipe, {"mlp": every(1, 8), "cross": every(1, 8)}, costs) as trace:
        assert torch.equal(run(pipe), before)
    assert trace.summary().startswith("did not reuse anything")
    with module_cache(pipe, {"mlp": every(3, 8), "cross": every(8, 8)}, costs) as trace:
        cached = run(pipe)
        assert torch.equal(run(pipe), cached) and not torch.equal(cached, before)
    cross, mlp = wan_cost(costs, "attn2"), wan_cost(costs, "ffn")
    expected = [1 - (k > 0) * cross - (k % 3 > 0) * mlp for k in range(8)]
    assert trace.shares["cond"] == trace.shares["uncond"] == pytest.approx(expected) and trace.cache_bytes > 0
    assert torch.equal(run(pipe), before)
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())


def test_components():
    """Three types on Wan; three on FLUX, whose single blocks project both branches at once. T-GATE is refused there."""
    assert {kind: len(found) for kind, found in components_of(build_pipe().transformer).items()} == {
        "attention": 2,
        "cross": 2,
        "mlp": 2,
    }
    pipe = build_flux()
    before, costs = generate(pipe, FLUX_CALL), forward_costs(pipe, FLUX_CALL)
    with module_cache(pipe, dict.fromkeys(components_of(pipe.transformer), every(2, 6)), costs) as trace:
        assert not torch.equal(generate(pipe, FLUX_CALL), before)
    assert 3 < trace.forwards["cond"] < 4
    with pytest.raises(
        erta.ErtaError,
        match="has no modules of type cross, only attention, mlp, parallel: this method is for WanTransformer3DModel",
    ):
        module_cache(pipe, t_gate.masks(6, 2, 1, 1, 1), costs)


def test_t_gate_by_hand():
    """10 steps, gate 5, warm-up 2; self-attention every 2nd step before the gate, every 3rd after."""
    made = t_gate.masks(10, 5, 2, 2, 3)
    assert [k for k, on in enumerate(made["cross"]) if on] == [0, 1, 2, 3, 4]
    assert [k for k, on in enumerate(made["attention"]) if on] == [0, 1, 2, 4, 5, 8]


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


@pytest.mark.parametrize("build, call, blocks", [(build_pipe, WAN_CALL, 2), (build_flux, FLUX_CALL, 3)])
def test_delta_dit_keeps_what_the_range_adds(build, call, blocks):
    """One block left out at every second step: the last early, the first late. With nothing left out: bit-identical.

    Mutants: the output kept in place of the delta, the same range at all steps, one state for both branches, the range's
    blocks run all the same.
    """
    pipe, steps = build(), call["num_inference_steps"]
    before, costs = generate(pipe, call), forward_costs(pipe, call)
    stack, place = blocks_of(pipe.transformer)
    assert len(stack) == blocks
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def note(index):
        def watch(module, args, kwargs, output):
            made = output if place is None else output[place]
            seen.append((index, latent_of(args, kwargs).clone(), made.clone()))

        return watch

    def run(interval):
        ranges, seen[:] = schedule(steps, interval, 0.5, blocks, 1), []
        states = StateManager(_RangeState)

        def hooks_of(scheduler):
            step = functools.partial(step_index, scheduler)
            return [(block, DeltaHook(k, ranges, step, states, place)) for k, block in enumerate(stack)]

        with hooked(pipe, costs, hooks_of) as trace:
            handles = [b.register_forward_hook(note(k), with_kwargs=True) for k, b in enumerate(stack)]
            made = generate(pipe, call)
            for handle in handles:
                handle.remove()
        return made, trace, seen[:]

    made, trace, _ = run(1)
    assert torch.equal(made, before) and not trace.reused_anything()
    made, trace, calls = run(2)
    assert not torch.equal(made, before) and trace.cache_bytes > 0
    branches = len(trace.forwards)
    deltas = [(index, after - at) for index, at, after in calls]
    per_step = [deltas[k * branches * blocks : (k + 1) * branches * blocks] for k in range(steps)]
    for step in range(1, steps, 2):
        left_out = blocks - 1 if step - 1 < steps / 2 else 0
        for here, there in zip(per_step[step], per_step[step - 1], strict=True):
            same = torch.allclose(here[1], there[1], atol=1e-5)
            assert same == (here[0] == left_out), (step, here[0])
    layers = [sum(c for n, c in costs.items() if pipe.transformer.get_submodule(n) in set(b.modules())) for b in stack]
    expected = [1, 1 - layers[-1]] * 2 + [1, 1 - layers[0]]
    assert trace.shares[next(iter(trace.shares))] == pytest.approx(expected[:steps])
    assert torch.equal(generate(pipe, call), before)


def test_delta_dit_ranges():
    """Mutant: a range that changes before its delta does."""
    ranges = schedule(6, 4, 0.5, 10, 7)
    assert [first for first, _, _ in ranges] == [3, 3, 3, 3, 0, 0] and [full for *_, full in ranges] == [
        1,
        0,
        0,
        0,
        1,
        0,
    ]
    assert {end - first for first, end, _ in ranges} == {7}


PEERS = {"fora": 5, "smoothcache": 4, "t_gate": 5, "delta_dit": 4}


@pytest.mark.slow
@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Through the command line: not more than the budget, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", f"cache.steps={PEERS[cache]}")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    assert record["plan_report"]["computed"] <= PEERS[cache] + 0.5
    made = [row["cached"]["forwards"] for row in rows]
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and max(made) < 12
    assert record["steps"]["without_reuse"] == 0 and record["memory"]["cache_bytes"] > 0
