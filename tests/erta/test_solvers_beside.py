"""Recorded trajectories and fitted solvers beside caches on the same transformer, and on pipelines that name no branches."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

import erta
from erta.pipeline import session_of
from tests.erta.matrix import ROWS, uncached
from tests.erta.test_sharing import beside
from tests.pipelines import CALL, PROMPTS, bare_plan, build_pipe, euler, run

SMALL = {**CALL, "num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 1}
MASK = (True, False, True, False)


def tables(scheduler: erta.FittedScheduler) -> list[np.ndarray]:
    return [scheduler.solver.velocity, scheduler.solver.latent, scheduler.solver.offset]


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_a_fit_beside_a_cache(site):
    """Bit for bit what it is alone, while a thread runs the cache; the cache too. Mutants: the fit's threads answered by the
    cache's hook; the scheduler of one pipeline's call handed to the other's.
    """
    first = build_pipe("euler", layers=1)
    second = beside(first, scheduler=euler())
    plan = bare_plan(first, MASK, site=site)
    recorded = erta.record(second, PROMPTS, **SMALL)
    wanted = erta.fit(second, recorded, steps=2, **SMALL)
    with erta.cached(first, plan):
        cached = run(first, **SMALL)
    wrong, done = [], threading.Event()

    def work() -> None:
        while not done.is_set():
            if not torch.equal(run(first, **SMALL), cached):
                wrong.append("cached")

    with erta.cached(first, plan) as trace:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            again = erta.record(second, PROMPTS, **SMALL)
            fitted = erta.fit(second, again, steps=2, **SMALL)
        finally:
            done.set()
            thread.join()
        with pytest.raises(erta.InstallError, match="installed on this pipeline already"):
            erta.record(first, PROMPTS, **SMALL)
        with pytest.raises(erta.InstallError, match="installed on this pipeline already"):
            erta.fit(first, recorded, steps=2, **SMALL)
    assert not wrong and trace.calls > 0
    assert np.array_equal(again.outputs, recorded.outputs) and np.array_equal(again.latents, recorded.latents)
    assert all(np.array_equal(one, other) for one, other in zip(tables(fitted), tables(wanted), strict=True))


def test_recording_changes_nobody_else():
    """Another pipeline in a callback, an exception on the way. Mutants: the copy of the scheduler left, or seen by others."""
    pipe = build_pipe("euler", layers=1)
    other, own, plain = beside(pipe), pipe.scheduler, run(pipe, **SMALL)
    seen = []

    def look(pipe, step, timestep, values):
        seen.append(torch.equal(run(other, **SMALL), plain))
        if len(seen) == 6:
            raise KeyError("the user's")
        return {}

    recorded = erta.record(pipe, PROMPTS[:1], callback_on_step_end=look, **SMALL)
    assert seen == [True] * 4 and recorded.num_steps == 4 and pipe.scheduler is own
    with pytest.raises(KeyError, match="the user's"):
        erta.record(pipe, PROMPTS[:1], callback_on_step_end=look, **SMALL)
    assert pipe.scheduler is own and session_of(pipe) is None and torch.equal(run(pipe, **SMALL), plain)


def test_what_no_solver_can_be_fitted_to_is_refused_at_once():
    """After one forward of each branch at most. Mutant: noticed after the whole run."""
    pipe, forwards = build_pipe("euler", layers=1), []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=5.0)
    with pytest.raises(erta.ErtaError, match="does not go down its grid"):
        erta.record(pipe, PROMPTS[:1], **SMALL)
    assert len(forwards) <= 2
    row = next(row for row in ROWS if row.pipeline == "StableDiffusion3Img2ImgPipeline")
    part, call = row.build()
    plan = erta.calibrate(part, window=3, **call).plan(steps=3)
    with pytest.raises(erta.ErtaError, match="a part of a schedule"):
        erta.collapse(part, plan)


def collapsed_and_cached(name, **options) -> tuple[str, float]:
    """What the solver is given, and how far the collapsed run is from the cached one, relative to the cache's own error."""
    pipe, call = next(row for row in ROWS if row.pipeline == name).build()
    made = erta.calibrate(pipe, window=5, **call)
    plan = made.plan(steps=3, rectify=False, **options)
    with erta.cached(pipe, plan):
        cached = uncached(pipe, call)
    plain = uncached(pipe, call)
    pipe.scheduler = erta.collapse(pipe, plan)
    collapsed = uncached(pipe, {**call, "num_inference_steps": 3})
    return made.signature["given_to_solver"], float((collapsed - cached).norm() / (cached - plain).norm())


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxKontextPipeline", "WanPipeline"])
def test_plans_collapse_whether_branches_have_names_or_not(name):
    """The solver that the plan amounts to gives what the cache gives. Mutant: branches that nobody names refused."""
    given, distance = collapsed_and_cached(name)
    assert given == "velocity" and distance < 1e-3


@pytest.mark.parametrize("name", ["ZImagePipeline", "HiDreamImagePipeline"])
def test_a_negated_velocity_collapses_where_it_is_reused_itself(name):
    """Residuals do not: they hold the latent. Mutant: the latent's part taken with the wrong sign, a wrong picture."""
    given, distance = collapsed_and_cached(name, reuse="velocity", adjust_time=False)
    assert given == "negated" and distance < 1e-3
    with pytest.raises(erta.ErtaError, match="the same negated: plan with reuse='velocity'"):
        collapsed_and_cached(name)


def test_what_is_no_velocity_does_not_collapse():
    """Cosmos 2 predicts the clean sample. Mutant: a solver of velocities made of it."""
    with pytest.raises(erta.ErtaError, match="something else made of it"):
        collapsed_and_cached("Cosmos2TextToImagePipeline", adjust_time=False)
