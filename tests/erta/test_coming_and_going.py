"""Caches put on and taken off in several threads, on one transformer that others run as it is."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers.hooks import HookRegistry

import erta
from tests.erta.test_sharing import Boom, abort_early, beside
from tests.pipelines import PROMPTS, bare_plan, build_pipe, euler, run, unipc


def come_and_go(rounds: int, site: str) -> None:
    """Two pipelines enter, run and leave in a thread each, every third round by an exception; a third one is never cached."""
    first = build_pipe(layers=1)
    pipes = [first, beside(first, scheduler=euler()), beside(first, scheduler=unipc())]
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "num_frames": 1}
    call["prompt_embeds"] = first.encode_prompt(PROMPTS[0], max_sequence_length=16)[0]
    call["negative_prompt_embeds"] = first.encode_prompt(PROMPTS[1], max_sequence_length=16)[0]

    def generate(pipe, **changes):
        return run(pipe, None, **call, **changes)

    plain = [generate(pipe) for pipe in pipes]
    plans = [bare_plan(pipe, (True, False), site=site) for pipe in pipes[:2]]
    expected = []
    for pipe, plan in zip(pipes, plans, strict=False):
        with erta.cached(pipe, plan):
            expected.append(generate(pipe))
    wrong: list[str] = []

    def cached_round(index: int, count: int) -> None:
        try:
            with erta.cached(pipes[index], plans[index]):
                if not torch.equal(generate(pipes[index]), expected[index]):
                    wrong.append(f"{index}, round {count}: another tensor")
                if count % 3 == index:
                    generate(pipes[index], callback_on_step_end=abort_early if count % 2 else abort_at_once)
                    wrong.append(f"{index}, round {count}: not aborted")
        except Boom:
            pass

    def work(index: int) -> None:
        for count in range(rounds):
            try:
                if index < 2:
                    cached_round(index, count)
                if not torch.equal(generate(pipes[index]), plain[index]):
                    wrong.append(f"{index}, round {count}: not the plain one")
            except Exception as error:
                wrong.append(f"{index}, round {count}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in first.transformer.__dict__
    assert HookRegistry.check_if_exists_or_initialize(first.transformer).hooks == {}
    assert all(not torch.equal(one, other) for one, other in zip(expected, plain, strict=False))


def abort_at_once(pipe, step, timestep, values):
    raise Boom


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_in_threads(site):
    """Mutants: a session lost when another joins; the hook taken from under another's call."""
    come_and_go(6, site)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["output", "blocks"])
def test_in_threads_for_long(site):
    """200 rounds, in two threads, without one wrong tensor. Mutants: those of the short one, in their rarer moments."""
    come_and_go(100, site)


def test_a_hook_that_just_went_is_asked_for():
    """A registry's loop in another thread. Mutant: a KeyError in a pipeline that nobody touched."""
    pipe = build_pipe(layers=1)
    with erta.cached(pipe, bare_plan(pipe)):
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        names = reversed(registry._hook_order)
    (name,) = names
    assert not registry.hooks[name]._is_stateful and registry.get_hook(name) is None and registry.hooks == {}
