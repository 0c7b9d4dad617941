"""Delta-DiT, by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.hooks.hooks import StateManager

from erta.architectures import blocks_of, latent_of
from erta.scheduler import step_index
from experiments.methods.common.modules import hooked
from experiments.methods.delta_dit import DeltaHook, _RangeState, schedule
from experiments.models.costs import forward_costs
from tests.pipelines import FLUX_CALL, WAN_CALL, build_flux, build_pipe, generate


@pytest.mark.parametrize("build, call, blocks", [(build_pipe, WAN_CALL, 2), (build_flux, FLUX_CALL, 3)])
def test_delta_dit_keeps_what_the_range_adds(build, call, blocks):
    """One block left out at every second step: the last early, the first late. With nothing left out: bit-identical.

    Mutants: the output kept in place of the delta, the same range at all steps, one state for both branches, the range's
    blocks run all the same.
    """
    pipe, steps = build(), call["num_inference_steps"]
    before, costs = generate(pipe, call), forward_costs(pipe, call)
    known = blocks_of(pipe.transformer, "the test")
    stack, place = known.of(pipe.transformer), known.output_index
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
            return [(block, DeltaHook(k, ranges, step, states, known)) for k, block in enumerate(stack)]

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
