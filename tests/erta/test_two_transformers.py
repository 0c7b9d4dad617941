"""Pipelines of two transformers (Wan2.2): state of each, one plan that computes the first step of both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry

import erta
from erta.grid import adjusted_sigmas, longer_last_step
from erta.guidance import guide
from erta.online import online
from erta.options import SITES
from erta.pipeline import SESSION, single_denoiser
from erta.policy import sources, steps_for_speedup, uniform_mask
from experiments.harness.setup import Setup
from experiments.methods.common.counting import diffusers_cache
from experiments.methods.common.searched import plan_of
from experiments.methods.easycache import EasyCache
from experiments.models.call import call_grid
from experiments.models.costs import forward_costs
from experiments.models.load import load_pipeline
from tests.commands import config
from tests.pipelines import CALL, PROMPTS, STEPS, build_pipe, build_two, run

TAKEOVER = 4
SCALE_2 = 2.5
BOTH = {**CALL, "guidance_scale_2": SCALE_2}
NAMES = ("transformer", "transformer_2")


def watch(pipe: WanPipeline) -> list[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """Fills with (transformer, input, output, timestep) of every forward, computed or reused."""
    seen: list[tuple[str, torch.Tensor, torch.Tensor, float]] = []
    for name in NAMES:

        def note(module, args, kwargs, output, name=name):
            seen.append((name, kwargs["hidden_states"], output[0], float(kwargs["timestep"][0])))

        getattr(pipe, name).register_forward_hook(note, with_kwargs=True)
    return seen


def bare_plan(pipe: WanPipeline, mask: tuple[bool, ...], takeover: int | None = TAKEOVER, **changes) -> erta.Plan:
    """A plan on the pipeline's own grid, without a calibration."""
    sigmas = call_grid(pipe, {**CALL, "num_inference_steps": len(mask)}).sigmas
    return erta.Plan(mask=mask, sigmas=sigmas, nominal_sigmas=sigmas, takeover=takeover, **changes)


def assert_bare(pipe: WanPipeline) -> None:
    """Nothing of a session or an observer is left on the pipeline and on both transformers."""
    assert SESSION not in pipe.__dict__
    for name in NAMES:
        transformer = getattr(pipe, name)
        assert "forward" not in transformer.__dict__, name
        assert HookRegistry.check_if_exists_or_initialize(transformer).hooks == {}, name


@pytest.fixture(scope="module")
def calibration() -> erta.Calibration:
    return erta.calibrate(build_two(), PROMPTS, window=6, **BOTH)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpmpp"])
@pytest.mark.parametrize("site", SITES)
def test_calibrate_plan_run(solver, site, tmp_path):
    """Nothing reused is bit-identical; both transformers reuse; files keep it all; the pipeline is as before.

    Mutants: a hook on the first transformer only; uninstall of one of the two.
    """
    pipe = build_two(solver)
    scheduler, plain = pipe.scheduler, run(pipe, **BOTH)
    made = erta.calibrate(pipe, PROMPTS[:1], site=site, window=6, **BOTH)
    assert_bare(pipe)
    assert pipe.scheduler is scheduler and made.takeover == TAKEOVER == call_grid(pipe, CALL).takeover
    made.save(tmp_path / "c.safetensors")
    plan = erta.Calibration.load(tmp_path / "c.safetensors").plan(steps=4)
    plan.save(tmp_path / "plan.json")
    plan = erta.Plan.load(tmp_path / "plan.json")
    assert (plan.takeover, plan.guidance_scale_2) == (TAKEOVER, SCALE_2)
    assert not all(plan.mask[:TAKEOVER]) and plan.num_computed == 4
    with erta.cached(pipe, plan) as trace:
        cached = run(pipe, **BOTH)
        assert torch.equal(run(pipe, **BOTH), cached)
    assert trace.forwards == {"cond": 4, "uncond": 4}
    assert trace.stages == {step: int(step >= TAKEOVER) for step in range(STEPS)}
    assert 0 < (cached - plain).abs().mean() < plain.abs().mean()
    with erta.cached(pipe, made.plan(steps=STEPS)):
        assert torch.equal(run(pipe, **BOTH), plain)
    assert_bare(pipe)
    assert pipe.scheduler is scheduler and torch.equal(run(pipe, **BOTH), plain)


def test_no_plan_reuses_across_the_boundary(calibration):
    """Pairs of steps in different transformers do not exist. Mutant: their statistics kept."""
    count = calibration.statistics.rel_l1.count[0]
    for step in range(STEPS):
        for gap in range(1, 7):
            exists = step - gap >= (TAKEOVER if step >= TAKEOVER else 0)
            assert (count[step, gap - 1] > 0) == exists, (step, gap)
            assert (calibration.statistics.moments.count[:, step, gap - 1] > 0).all() == exists
    for changes in (
        {"threshold": 1e9},
        *({"steps": k, "policy": p} for k in range(2, 9) for p in ("threshold", "uniform")),
    ):
        plan = calibration.plan(**changes)
        assert plan.mask[0] and plan.mask[TAKEOVER]
        assert plan.num_computed == changes.get("steps", 2)
    with pytest.raises(erta.ErtaError, match="must compute step 4"):
        erta.Plan(mask=(True,) * 4 + (False,) * 4, sigmas=np.linspace(1, 0, 9), takeover=TAKEOVER)
    with pytest.raises(erta.ErtaError, match="cannot take over at step 9 of 8"):
        erta.Plan(mask=(True,) * 8, sigmas=np.linspace(1, 0, 9), takeover=9)


def test_states_do_not_mix():
    """Each transformer reuses its own residual, by hand. Mutants: one shared state; the first one's kept for good."""
    pipe = build_two()
    mask = (True, False, False, True, True, True, False, False)
    seen, held = watch(pipe), []

    def look(pipe, step, timestep, values):
        hooks = pipe.__dict__[SESSION].hooks
        held.append([len(hooks[stage].kept) for stage in (0, 1)])
        return {}

    with erta.cached(pipe, bare_plan(pipe, mask)) as trace:
        latents = run(pipe, callback_on_step_end=look, **BOTH)
    assert [name for name, *_ in seen[::2]] == ["transformer"] * 4 + ["transformer_2"] * 4
    for step, source in enumerate(sources(mask)):
        for branch in range(2):
            (_, x, v, _), (_, x_source, v_source, _) = seen[2 * step + branch], seen[2 * source + branch]
            torch.testing.assert_close(v, x + (v_source - x_source) if source != step else v, rtol=0, atol=0)
    assert held == [[2, 0]] * 4 + [[0, 2]] * 4  # and what the second cannot use is freed
    assert trace.cache_bytes == 2 * latents.numel() * 4
    unaware = bare_plan(pipe, (True,) * 4 + (False,) * 4, takeover=None)
    with erta.cached(pipe, unaware), pytest.raises(erta.ExecutionMismatch, match="step 4 .*nothing was computed"):
        run(pipe, **BOTH)


def test_the_second_scale_counts_in_phi():
    """phi of a step in each transformer, by hand. Mutant: the first scale everywhere."""
    pipe = build_two()
    seen = watch(pipe)
    made = erta.calibrate(pipe, PROMPTS[:1], window=2, **BOTH)
    assert made.signature["guidance_scale_2"] == SCALE_2
    for step, scale in ((3, CALL["guidance_scale"]), (6, SCALE_2)):
        (_, x, *_), now = seen[2 * step], {"cond": seen[2 * step][2], "uncond": seen[2 * step + 1][2]}
        old = {"cond": seen[2 * step - 2], "uncond": seen[2 * step - 1]}
        predicted = {branch: x + (v - x_old) for branch, (_, x_old, v, _) in old.items()}
        guided = guide(now, scale)
        ratio = (guide(predicted, scale) - guided).abs().sum() / guided.abs().sum()
        assert made.statistics.phi_ratio.mean[0, step, 0] == pytest.approx(float(ratio), rel=1e-4)


def test_another_second_scale_is_refused(calibration):
    """Mutant: only the first scale is compared. Without a second scale the first holds for both, as in the pipeline."""
    pipe = build_two()
    with erta.cached(pipe, calibration.plan(steps=4)):
        with pytest.raises(erta.SignatureMismatch, match="guidance_scale_2 was 2.5 .* is 4.0 now"):
            run(pipe)
        with pytest.raises(erta.SignatureMismatch, match="guidance_scale_2 was 2.5 .* is 3.0 now"):
            run(pipe, guidance_scale_2=3.0)
    one = erta.calibrate(pipe, PROMPTS[:1], window=6, **CALL)
    with erta.cached(pipe, one.plan(steps=4)) as trace:
        assert torch.equal(run(pipe), run(pipe, guidance_scale_2=CALL["guidance_scale"]))
    assert trace.calls == 2
    with pytest.raises(erta.SignatureMismatch, match="guidance_scale_2"):
        calibration.merge(one)


def test_another_boundary_or_second_transformer_is_refused(calibration):
    """Before anything runs, and both stay bare. Mutants: the digest of the first alone; the boundary not compared."""
    plan = calibration.plan(steps=4)
    for pipe, field in (
        (build_two(boundary=0.6), "boundary_ratio was 0.85 .* is 0.6 now"),
        (build_two(boundary=None), "boundary_ratio was 0.85 .* is 0.0 now"),
        (build_two(seed=8), "weights"),
        (build_pipe(), "model_config|weights"),
    ):
        with pytest.raises(erta.SignatureMismatch, match=field):
            erta.install(pipe, plan)
        assert SESSION not in pipe.__dict__ and "forward" not in pipe.transformer.__dict__


@pytest.mark.parametrize("planned", [3, 6])
def test_a_takeover_at_another_step_is_noticed(planned):
    """Mutant: the transformer that runs is not compared with the plan's. It is noticed at the first such step."""
    pipe, steps = build_two(), []
    plan = bare_plan(pipe, (True,) * STEPS, takeover=planned)

    def count(pipe, step, timestep, values):
        steps.append(step)
        return {}

    with erta.cached(pipe, plan), pytest.raises(erta.SignatureMismatch, match=f"takeover was 'step {planned}'"):
        run(pipe, callback_on_step_end=count)
    assert len(steps) == min(planned, TAKEOVER)


def test_an_exception_inside_leaves_both_as_before():
    """In a cached call and in a calibration, in the second transformer. Mutant: only the first hook comes off."""
    pipe = build_two()
    before, scheduler = run(pipe, **BOTH), pipe.scheduler

    def explode(pipe, step, timestep, values):
        if step == TAKEOVER + 1:
            raise RuntimeError("boom")
        return {}

    plan = bare_plan(pipe, (True, False) * 4)
    with erta.cached(pipe, plan):
        good = run(pipe, **BOTH)
        with pytest.raises(RuntimeError, match="boom"):
            run(pipe, PROMPTS[1], callback_on_step_end=explode, **BOTH)
        assert torch.equal(run(pipe, **BOTH), good) and not torch.equal(good, before)
    with pytest.raises(RuntimeError, match="boom"), erta.cached(pipe, plan):
        run(pipe, callback_on_step_end=explode, **BOTH)
    assert_bare(pipe)
    with pytest.raises(RuntimeError, match="boom"):
        erta.calibrate(pipe, PROMPTS[:1], callback_on_step_end=explode, **BOTH)
    assert_bare(pipe)
    assert pipe.scheduler is scheduler and torch.equal(run(pipe, **BOTH), before)


def test_a_refused_second_leaves_the_first_bare():
    """Mutant: hooks put on before the refusal stay."""
    pipe = build_two()
    plan = bare_plan(pipe, (True,) * STEPS)
    pipe.transformer_2.compile()
    with pytest.raises(erta.InstallError, match="compile_repeated_blocks"):
        erta.install(pipe, plan)
    with pytest.raises(erta.ErtaError, match="compile_repeated_blocks"):
        erta.calibrate(pipe, PROMPTS[:1], **BOTH)
    assert_bare(pipe)


def test_a_hook_dropped_from_the_second_is_noticed():
    """Mutant: executed and planned are compared over the first transformer's steps only."""
    pipe = build_two()
    with erta.cached(pipe, bare_plan(pipe, (True, False) * 4)):
        run(pipe, **BOTH)
        del pipe.transformer_2.__dict__["forward"]
        with pytest.raises(erta.ExecutionMismatch, match="4 calls"):
            run(pipe, **BOTH)


def test_model_offload_over_several_calls():
    """Offload drops the hooks of both after every call. Mutant: only the first is attached again."""
    pipe = build_two()
    plan = bare_plan(pipe, (True, False) * 4)
    with erta.cached(pipe, plan):
        wanted = run(pipe, **BOTH)
    pipe.enable_model_cpu_offload(device="cpu")
    before = run(pipe, **BOTH)
    with erta.cached(pipe, plan) as trace:
        for _ in range(3):
            assert torch.equal(run(pipe, **BOTH), wanted)
    assert trace.calls == 3 and trace.forwards == {"cond": 4, "uncond": 4}
    assert torch.equal(run(pipe, **BOTH), before)


@pytest.mark.parametrize(
    ("boundary", "steps", "takeover"),
    [(None, STEPS, STEPS), (0.85, 2, 1), (0.8, 2, 2), (0.3, STEPS, STEPS), (1.0, 3, 0)],
)
def test_a_boundary_that_leaves_one_unused(boundary, steps, takeover):
    """One transformer's plans need one step. Mutant: the second's first step is looked up beyond the grid."""
    pipe = build_two(boundary=boundary)
    call = {**CALL, "num_inference_steps": steps}
    made = erta.calibrate(pipe, PROMPTS[:1], window=8, **call)
    assert made.takeover == takeover == call_grid(pipe, call).takeover
    least = 2 if 0 < takeover < steps else 1
    with pytest.raises(erta.BudgetError, match=f"there are {least} to {steps} to choose from"):
        made.plan(steps=least - 1)
    for policy in ("threshold", "uniform"):
        plan = made.plan(steps=least, policy=policy)
        with erta.cached(pipe, plan) as trace:
            latents = run(pipe, **call)
        assert trace.forwards == {"cond": least, "uncond": least} and set(trace.stages.values()) == {
            int(step >= takeover) for step in range(steps)
        }
    if takeover == steps:  # as if there were one transformer
        one = build_pipe()
        with erta.cached(one, replace(plan, signature=None, takeover=None, guidance_scale_2=None)):
            assert torch.equal(run(one, **call), latents)


def test_the_grid_moves_on_both_sides_of_the_boundary(calibration):
    """The step of the takeover keeps its sigma, or the pipeline would change transformers at another step.

    Mutant: one adjustment over the whole grid.
    """
    linear = np.linspace(1, 0, 9, dtype=np.float32)
    mask, phi = (True, False, True, True, True, False, True, True), np.full(8, 0.5)
    moved = adjusted_sigmas(linear, mask, phi, TAKEOVER)
    parts = [adjusted_sigmas(linear[ends], mask[:4], phi[:4]) for ends in (slice(0, 5), slice(4, 9))]
    np.testing.assert_array_equal(moved, [*parts[0], *parts[1][1:]])
    assert moved[4] == linear[4] and (moved[[2, 3, 6, 7]] > linear[[2, 3, 6, 7]]).all()
    control = longer_last_step(linear, moved, TAKEOVER)
    np.testing.assert_allclose(control[[3, 4, 7, 8]], moved[[3, 4, 7, 8]], rtol=1e-6)
    plan = calibration.plan(steps=4, policy="uniform")
    assert plan.sigmas[TAKEOVER] == plan.nominal_sigmas[TAKEOVER]
    changed = np.flatnonzero(plan.sigmas != plan.nominal_sigmas)
    assert changed.min() < TAKEOVER < changed.max()
    pipe = build_two()
    seen = watch(pipe)
    with erta.cached(pipe, plan):
        run(pipe, **BOTH)
    assert [name for name, _, _, t in seen[::2] if t >= 850] == ["transformer"] * 4
    grid = plan.grid_only()
    assert grid.takeover == 2
    with erta.cached(pipe, grid) as trace:
        run(pipe, **{**BOTH, "num_inference_steps": 4})
    assert trace.stages == {0: 0, 1: 0, 2: 1, 3: 1}


def test_budgets_of_two_transformers(calibration):
    """Errors say what can be reached. Mutant: one step is enough."""
    for policy in ("threshold", "uniform"):
        with pytest.raises(erta.BudgetError, match="there are 2 to 8 .* each of the two transformers"):
            calibration.plan(steps=1, policy=policy)
        with pytest.raises(erta.BudgetError, match="each of the two transformers .* largest is 4"):
            calibration.plan(speedup=8, policy=policy)
        assert calibration.plan(speedup=4, policy=policy).num_computed == 2
    assert steps_for_speedup(9, 4.5, 4) == 2 and steps_for_speedup(8, 8.0, 0) == 1
    golden = {
        (8, 2, 4): "10001000",
        (8, 3, 1): "11001000",
        (8, 4, 7): "10101001",
        (8, 7, 6): "11111011",
        (5, 5, 3): "11111",
    }
    for (steps, count, takeover), mask in golden.items():
        assert "".join(str(int(one)) for one in uniform_mask(steps, count, takeover)) == mask, (steps, count, takeover)
    for steps in range(2, 9):
        for takeover in range(1, steps):
            for count in range(2, steps + 1):
                mask = uniform_mask(steps, count, takeover)
                assert sum(mask) == count and len(mask) == steps and mask[0] and mask[takeover]


@pytest.mark.parametrize("reused", [2, 7])
def test_one_reused_step_is_split_and_fitted_alike(calibration, reused):
    """With one reused step, in either transformer, its error is the open-loop one and all there is to inject.

    Mutants: the first scale everywhere in the split; only the first transformer's reuse shown to the fit.
    """
    pipe = build_two()
    mask = tuple(step != reused for step in range(STEPS))
    made = erta.calibrate(pipe, PROMPTS[:1], window=2, seed=3, **BOTH)
    plan = replace(made.plan(steps=STEPS), mask=mask)
    split = erta.decompose(pipe, plan, PROMPTS[0], seed=3, **BOTH)
    assert split.total_norm > 1e-3 and split.closure < 2e-5
    assert split.open_loop_norm == pytest.approx(split.norms["injected"], rel=1e-4)
    assert np.flatnonzero(split.injected_by_step).tolist() == [reused]
    assert split.propagated_by_step[: reused + 1] == pytest.approx(0, abs=1e-6)
    if reused == STEPS - 1:
        assert split.open_loop_norm == pytest.approx(split.total_norm, rel=1e-4)
    fitted = erta.refit(pipe, replace(plan, rectification=None), PROMPTS[:1], seed=3, **BOTH).rectification
    opened = made.rectification(mask)
    np.testing.assert_allclose(fitted.gain[reused], opened.gain[reused], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fitted.offset[reused], opened.offset[reused], rtol=1e-3, atol=1e-4)
    assert_bare(pipe)


def test_not_carried_over_to_other_steps(calibration):
    with pytest.raises(erta.ErtaError, match="two transformers is not interpolated"):
        erta.interpolate(calibration, np.array(calibration.signature["sigmas"])[[0, 2, 4, 6, 8]])


def test_pipelines_whose_second_transformer_is_not_understood():
    pipe = build_two()
    pipe.transformer_2 = torch.nn.Linear(2, 2)
    with pytest.raises(erta.ErtaError, match="different classes"):
        erta.calibrate(pipe, PROMPTS, **CALL)
    pipe = build_two()
    pipe._internal_dict = {key: value for key, value in pipe.config.items() if key != "boundary_ratio"}
    with pytest.raises(erta.ErtaError, match="no boundary_ratio"):
        erta.calibrate(pipe, PROMPTS, **CALL)


def test_caches_that_decide_while_they_run_are_refused():
    """They keep one state. Mutant: put on the first transformer alone, so half of the steps are never seen."""
    pipe = build_two()
    with pytest.raises(erta.InstallError, match="has two transformers"), online(pipe, EasyCache(0.1)):
        pass
    with pytest.raises(erta.InstallError, match="has two transformers"):
        forward_costs(pipe, CALL)
    with (
        pytest.raises(erta.InstallError, match="has two transformers"),
        diffusers_cache(pipe, FirstBlockCacheConfig(0.1), {}),
    ):
        pass
    with pytest.raises(erta.InstallError, match="has two transformers"):
        plan_of(Setup(config(), pipe), (True,) * 8, {})
    assert_bare(pipe)


def test_a_lone_second_transformer_is_the_only_one():
    """Mutant: the first taken for granted, a KeyError."""
    pipe = build_two()
    pipe.transformer = None
    assert single_denoiser(pipe) is pipe.transformer_2


@pytest.mark.parametrize(("cache", "computed"), [("ertacache", 3), ("uniform", 3), ("plan_grid", 3)])
def test_through_the_main_job(command, tmp_path, cache, computed):
    """Wan2.2's configuration: calibrated, planned, cached, decoded, measured; every forward of both is counted.

    Mutants: the clock on the first transformer only; uniform without the second's first step.
    """
    build_two().save_pretrained(tmp_path / "two")
    out = tmp_path / "outputs" / cache
    code, printed = command(
        "model=wan22_a14b", f"model.path={tmp_path / 'two'}", "model.prompt_source=scenes", "model.dtype=float32",
        "model.flow_shift=5", "model.max_sequence_length=16", "bench=fidelity", "bench.num_prompts=1",
        f"cache={cache}", f"cache.steps={computed}", f"hydra.run.dir={out}",
    )  # fmt: skip
    assert code == 0, printed
    record, plan = (json.loads(Path(out, name).read_text()) for name in ("record.json", "plan.json"))
    assert record["config"]["model"]["guidance_scale_2"] == 3.0 and record["metrics"]["psnr_db"] > 0
    assert record["steps"]["computed"] == computed
    assert record["timing"]["forwards_uncached"] == 12 and record["timing"]["forwards"] == 2 * computed
    takeover = {"plan_grid": None}.get(cache, 3)
    if takeover is not None:
        assert plan["takeover"] == takeover and plan["steps"]["mask"][takeover] == 1
        assert record["memory"]["cache_bytes"] == 2 * 4 * 16 * 2 * 8 * 8
    for arm in ("uncached", "cached"):
        assert (out / "samples" / arm / "000.mp4").stat().st_size > 0


def test_loading(tmp_path):
    """Both are compiled; a second scale needs a second transformer. Mutant: the first alone is compiled."""
    build_two().save_pretrained(tmp_path / "two")
    build_pipe().save_pretrained(tmp_path / "one")
    pipe = load_pipeline(config("model=wan22_a14b", f"model.path={tmp_path / 'two'}", "model.compile=true"))
    for name in NAMES:
        assert all(block._compiled_call_impl is not None for block in getattr(pipe, name).blocks), name
    assert pipe.scheduler.config.flow_shift == 12 and pipe.config.boundary_ratio == 0.85
    with pytest.raises(erta.ErtaError, match=r"guidance_scale_2 .* wan21 has one"):
        load_pipeline(config("model=wan21", f"model.path={tmp_path / 'one'}", "model.guidance_scale_2=3"))
