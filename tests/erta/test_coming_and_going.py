"""Caches put on and taken off in several threads, on one transformer that others run as it is."""

from __future__ import annotations

from contextlib import suppress

import pytest
from diffusers.hooks import HookRegistry

import erta
from tests.erta.test_sharing import Boom, Trio, abort_early
from tests.pipelines import bare_plan, build_pipe


def come_and_go(rounds: int, site: str) -> None:
    """Two pipelines enter, run and leave in a thread each, every third round by an exception; a third one is never cached."""
    trio = Trio([(True, False), (True, False)], site)

    def cached_round(index: int, count: int) -> None:
        with erta.cached(trio.pipes[index], trio.plans[index]):
            trio.expect(index, count, trio.planned[index])
            if count % 3 == index:
                with pytest.raises(Boom):
                    abort = abort_early if count % 2 else abort_at_once
                    trio.generate(trio.pipes[index], callback_on_step_end=abort)
                raise Boom

    def one_round(index: int, count: int) -> None:
        if index < len(trio.plans):
            with suppress(Boom):
                cached_round(index, count)
        trio.expect(index, count, trio.plain[index])

    trio.in_threads(rounds, one_round)
    assert "forward" not in trio.first.transformer.__dict__
    assert HookRegistry.check_if_exists_or_initialize(trio.first.transformer).hooks == {}


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
