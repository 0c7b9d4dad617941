"""The cache on an unmodified pipeline. What each test would catch is said beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry

import erta
from erta.grid import adjusted_sigmas
from erta.options import SITES
from erta.policy import sources
from tests.pipelines import CALL, PROMPTS, SOLVERS, SOME, STEPS, bare_plan, build_pipe, run

ALL = (True,) * STEPS


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_reused_is_bit_identical(solver):
    pipe = build_pipe(solver)
    plain = run(pipe)
    with erta.cached(pipe, bare_plan(pipe, ALL)) as trace:
        cached = run(pipe)
    assert torch.equal(plain, cached)
    assert trace.forwards == {"cond": STEPS, "uncond": STEPS}
    assert trace.cache_bytes == 0 and "(empty)" in trace.summary()  # mutant: residuals kept that nothing will reuse


@pytest.mark.parametrize("solver", SOLVERS)
def test_phi_one_is_the_original_grid_bit_for_bit(solver):
    """Through the grid's arithmetic and through the scheduler: sigmas, integer timesteps, and the result."""
    pipe = build_pipe(solver)
    nominal = bare_plan(pipe)
    sigmas, timesteps, same = pipe.scheduler.sigmas.clone(), pipe.scheduler.timesteps.clone(), []

    def look(pipe, step, timestep, values):
        same.append(torch.equal(pipe.scheduler.sigmas, sigmas) and torch.equal(pipe.scheduler.timesteps, timesteps))
        return {}

    adjusted = replace(nominal, sigmas=adjusted_sigmas(nominal.sigmas, SOME, np.ones(STEPS)))
    with erta.cached(pipe, nominal):
        wanted = run(pipe)
    with erta.cached(pipe, adjusted):
        found = run(pipe, callback_on_step_end=look)
    assert torch.equal(found, wanted) and same == [True] * STEPS


def test_velocity_reuse_under_euler_is_plan_grid():
    """Mutants: residual for velocity, a grid off by one, the corrector index. The identity is exact in theory."""
    pipe = build_pipe("euler")
    plan = bare_plan(pipe, reuse="velocity")
    with erta.cached(pipe, plan):
        reused = run(pipe)
    grid = plan.grid_only()
    with erta.cached(pipe, grid) as trace:
        coarse = run(pipe, num_inference_steps=grid.num_steps)
    assert trace.forwards == {"cond": 4, "uncond": 4}
    torch.testing.assert_close(reused, coarse, rtol=0, atol=2e-5)
    assert (run(pipe) - coarse).abs().max() > 0.01  # and it is not what the full grid gives


def test_residual_reuse_by_hand():
    """One reused step under Euler, by the formula `x + r`, branch by branch. Mutants: v - x swapped, mixed branches."""
    pipe = build_pipe("euler")
    seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.setdefault(
            (len(seen) // 2, ("cond", "uncond")[len(seen) % 2]), (kwargs["hidden_states"], output[0])
        ),
        with_kwargs=True,
    )
    with erta.cached(pipe, bare_plan(pipe, (True, False, *ALL[2:]))):
        run(pipe)
    for branch in ("cond", "uncond"):
        (x0, v0), (x1, v1) = seen[0, branch], seen[1, branch]
        torch.testing.assert_close(v1, x1 + (v0 - x0), rtol=0, atol=0)
    assert not torch.equal(seen[1, "cond"][1], seen[1, "uncond"][1])


def test_branches_do_not_mix():
    """At every reused step each branch draws on its own residual. Mutant: one state for both branches."""
    pipe = build_pipe("euler")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    plan = bare_plan(pipe)
    with erta.cached(pipe, plan):
        run(pipe, negative_prompt=PROMPTS[1])
    for step, source in enumerate(sources(plan.mask)):
        for branch in range(2):
            (x, v), (x_source, v_source) = seen[2 * step + branch], seen[2 * source + branch]
            other_v = seen[2 * source + 1 - branch][1]
            if source != step:
                torch.testing.assert_close(v, x + (v_source - x_source), rtol=0, atol=0)
                assert (v_source - other_v).abs().max() > 1e-4  # the branches differ, so mixing would show


def test_two_runs_in_a_row_are_identical():
    """State of one call must not reach the next."""
    pipe = build_pipe()
    with erta.cached(pipe, bare_plan(pipe)) as trace:
        first, other, second = run(pipe), run(pipe, PROMPTS[1], seed=9), run(pipe)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert trace.calls == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_uninstall_restores_everything(solver, calibrations):
    pipe = build_pipe(solver)
    before, scheduler, kind = run(pipe), pipe.scheduler, type(pipe)
    erta.install(pipe, calibrations[solver].plan(steps=4))
    assert not torch.equal(run(pipe), before)
    erta.uninstall(pipe)
    assert pipe.scheduler is scheduler and type(pipe) is kind
    assert "forward" not in pipe.transformer.__dict__ and "_erta_session" not in pipe.__dict__
    assert HookRegistry.check_if_exists_or_initialize(pipe.transformer).hooks == {}
    assert torch.equal(run(pipe), before)
    erta.uninstall(pipe)  # a second time does nothing


def test_an_exception_inside_leaves_the_pipeline_as_before():
    pipe = build_pipe()
    before = run(pipe)

    def explode(pipe, step, timestep, values):
        if step == 3:
            raise RuntimeError("boom")
        return values

    with pytest.raises(RuntimeError, match="boom"), erta.cached(pipe, bare_plan(pipe)):
        run(pipe, callback_on_step_end=explode)
    assert torch.equal(run(pipe), before)


def test_an_exception_in_one_call_does_not_spoil_the_next():
    pipe = build_pipe()

    def explode(pipe, step, timestep, values):
        raise RuntimeError("boom")

    with erta.cached(pipe, bare_plan(pipe)):
        good = run(pipe)
        with pytest.raises(RuntimeError, match="boom"):
            run(pipe, PROMPTS[1], callback_on_step_end=explode)
        assert torch.equal(run(pipe), good)


def test_a_dropped_hook_is_noticed():
    """A forward that was put back makes an uncached run: it must not pass for a cached one."""
    pipe = build_pipe()
    with erta.cached(pipe, bare_plan(pipe)):
        run(pipe)
        del pipe.transformer.__dict__["forward"]
        with pytest.raises(erta.ExecutionMismatch, match="without the cache"):
            run(pipe)


def test_model_offload_over_several_calls():
    """Offload renews its own forward after every call, which drops ours. Mutant: no second attaching."""
    pipe = build_pipe()
    with erta.cached(pipe, bare_plan(pipe)):
        wanted = run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    before = run(pipe)
    with erta.cached(pipe, bare_plan(pipe)) as trace:
        for _ in range(3):
            assert torch.equal(run(pipe), wanted)
    assert trace.calls == 3 and trace.forwards == {"cond": 4, "uncond": 4}
    assert torch.equal(run(pipe), before)


def test_an_interrupted_pipeline_returns_what_it_has():
    """As without a cache; the trace says how far it got, and the next call is whole.

    Mutants: it is an error; it passes for a whole run; what was executed up to there is not compared with the plan.
    """
    pipe = build_pipe()

    def interrupt(last):
        def callback(pipe, step, timestep, values):
            pipe._interrupt = step >= last
            return values

        return {"callback_on_step_end": callback}

    plain = {stop: run(pipe, **interrupt(stop)) for stop in (0, 4)}
    with erta.cached(pipe, bare_plan(pipe)) as trace:
        whole = run(pipe)
        assert not trace.interrupted
        for stop, computed in ((0, 1), (4, 3)):
            stopped = run(pipe, **interrupt(stop))
            assert trace.interrupted and trace.forwards == {"cond": computed, "uncond": computed}
            assert trace.summary().startswith(f"interrupted after {stop + 1} of 8 steps")
            assert torch.equal(stopped, plain[stop]) == (stop == 0)
        assert torch.equal(run(pipe), whole) and not trace.interrupted and trace.calls == 4
    with erta.cached(pipe, bare_plan(pipe, ALL)) as trace:
        assert torch.equal(run(pipe, **interrupt(stop)), plain[stop]) and trace.interrupted
        del pipe.transformer.__dict__["forward"]
        with pytest.raises(erta.ExecutionMismatch, match="without the cache"):
            run(pipe)


def test_components_moved_inside_stay_moved(pipe):
    """Another dtype from the next call on, as an uncached run has it. Mutants: put back on leaving; the plan lost."""
    plan = bare_plan(pipe)
    with erta.cached(pipe, plan) as trace:
        before = run(pipe)
        pipe.to(torch.float64)
        moved = run(pipe)
    assert trace.calls == 2 and trace.cache_dtype == "float64" and pipe.transformer.dtype == torch.float64
    assert 0 < (moved - before).abs().max() < 1e-3


def test_other_steps_than_planned(pipe):
    with erta.cached(pipe, bare_plan(pipe)), pytest.raises(erta.SignatureMismatch, match="num_inference_steps was 8"):
        run(pipe, num_inference_steps=6)


def test_other_guidance_and_size_than_calibrated(calibrations):
    pipe = build_pipe()
    with erta.cached(pipe, calibrations["unipc"].plan(steps=4)):
        with pytest.raises(erta.SignatureMismatch, match="guidance_scale was 4.0"):
            run(pipe, guidance_scale=7.0)
        with pytest.raises(erta.SignatureMismatch, match="latent_shape"):
            run(pipe, height=64)


def test_installing_twice(pipe):
    with erta.cached(pipe, bare_plan(pipe)), pytest.raises(erta.InstallError, match="already"):
        erta.install(pipe, bare_plan(pipe))


def test_on_top_of_diffusers_own_cache(pipe):
    plan = bare_plan(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(erta.InstallError, match="disable_cache"):
        erta.install(pipe, plan)
    assert "_erta_session" not in pipe.__dict__
    pipe.transformer.disable_cache()
    erta.install(pipe, plan)


def test_a_transformer_that_was_compiled_whole_is_refused(pipe):
    plan = bare_plan(pipe)
    pipe.transformer.compile()
    with pytest.raises(erta.InstallError, match="compile_repeated_blocks"):
        erta.install(pipe, plan)
    wrapped = build_pipe()
    wrapped.transformer = torch.compile(wrapped.transformer)
    with pytest.raises(erta.InstallError, match="compile_repeated_blocks"):
        erta.install(wrapped, plan)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_compiled_blocks_are_not_compiled_anew(site):
    """The number of graphs stays what it is after the second step, at both sites. Mutant: hooks on the blocks."""
    pipe, graphs = build_pipe(), []
    plan = bare_plan(pipe, site=site)
    with erta.cached(pipe, plan):
        wanted = run(pipe)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)

    def count(pipe, step, timestep, values):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return {}

    torch._dynamo.utils.counters.clear()
    with erta.cached(pipe, plan):
        found = run(pipe, callback_on_step_end=count)
        again = run(pipe, callback_on_step_end=count)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(found, again) and graphs[1] > 0 and set(graphs[1:]) == {graphs[1]}


def test_several_videos_per_prompt_equal_single_ones(calibrations):
    pipe = build_pipe()
    plan = calibrations["unipc"].plan(steps=4)
    noise = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with erta.cached(pipe, plan):
        both = run(pipe, num_videos_per_prompt=2, latents=noise.clone())
        single = torch.cat([run(pipe, latents=noise[k : k + 1].clone()) for k in range(2)])
    torch.testing.assert_close(both, single, rtol=0, atol=1e-4)


def test_corrector_is_off_at_reused_steps_only():
    """UniPC skips its corrector at step k + 1 for every k listed; a reused step i must be listed as i - 1."""
    pipe, seen = build_pipe(), []
    plan = bare_plan(pipe, corrector_at_reused=False)
    with erta.cached(pipe, plan):
        without = run(
            pipe, callback_on_step_end=lambda pipe, *_: seen.append([*pipe.scheduler.disable_corrector]) or {}
        )
    assert seen == [[k - 1 for k, computed in enumerate(SOME) if not computed]] * STEPS
    assert pipe.scheduler.disable_corrector == []
    with erta.cached(pipe, bare_plan(pipe)):
        assert not torch.equal(without, run(pipe))
    with pytest.raises(erta.InstallError, match="no corrector"):
        other = build_pipe("euler")
        erta.install(other, bare_plan(other, corrector_at_reused=False))


def test_adjusted_grid_is_what_the_model_sees(calibrations):
    """Computed steps are evaluated at their adjusted time; the trajectory ends at sigma 0."""
    plan = calibrations["euler"].plan(steps=4, rectify=False)
    assert not np.array_equal(plan.sigmas, plan.nominal_sigmas) and plan.sigmas[-1] == 0
    pipe, seen = build_pipe("euler"), []
    with erta.cached(pipe, plan):
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
        run(pipe)
    np.testing.assert_allclose(seen[::2], 1000 * plan.sigmas[:-1], rtol=1e-5)


def test_cache_holds_one_latent_a_branch(pipe):
    with erta.cached(pipe, bare_plan(pipe)) as trace:
        latents = run(pipe)
    assert trace.cache_bytes == 2 * latents.numel() * 4 and trace.cache_dtype == "float32"
    assert "4 of 8 steps computed" in trace.summary()


def test_a_residual_goes_when_nothing_will_reuse_it(pipe):
    """Mutants: residuals kept until the end, by the hook or by the trace; the size of those that went forgotten."""
    alive = []
    with erta.cached(pipe, bare_plan(pipe, (True, False, *ALL[2:]))) as trace:

        def look(pipe, step, timestep, values):
            alive.append([not kept.is_meta for kept in trace.cached.values()])
            return {}

        latents = run(pipe, callback_on_step_end=look)
    assert alive == [[True, True]] * 2 + [[False, False]] * (STEPS - 2)
    assert trace.cache_bytes == 2 * latents.numel() * 4 and trace.cache_dtype == "float32"


def test_weights_that_changed(calibrations):
    pipe = build_pipe()
    plan = calibrations["unipc"].plan(steps=4)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_q.weight.add_(0.1)
    with pytest.raises(erta.SignatureMismatch, match="weights"):
        erta.install(pipe, plan)
    assert "forward" not in pipe.transformer.__dict__


def test_other_scheduler_and_dtype(calibrations):
    plan = calibrations["unipc"].plan(steps=4)
    with pytest.raises(erta.SignatureMismatch, match="scheduler"):
        erta.install(build_pipe("euler"), plan)
    pipe = build_pipe()
    pipe.transformer.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="float32"):
        erta.install(pipe, plan)


def test_call_arguments_are_the_pipelines_own(pipe):
    with erta.cached(pipe, bare_plan(pipe)), pytest.raises(TypeError, match="no_such_argument"):
        pipe(prompt="x", no_such_argument=1, **CALL)
