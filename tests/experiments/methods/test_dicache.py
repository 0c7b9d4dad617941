"""DiCache and SenCache: decisions by hand, what they run counted, and their way through the harness."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from erta.online import Call, online
from experiments.methods.dicache import DiCache, probe_share
from experiments.models.costs import forward_costs
from tests.pipelines import FLUX_CALL, WAN_CALL, build_flux, build_pipe, generate


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
    share = probe_share(SimpleNamespace(pipe=pipe, costs=forward_costs(pipe, call)))
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
