"""A static plan is a linear multistep solver: collapsed, it gives what the hooked run gives."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

import erta
from erta.grid import longer_last_step
from erta.plan import Rectification
from erta.scheduler import nominal_sigmas, with_grid
from erta.solver import linear_solver
from tests.pipelines import CALL, FLUX_CALL, PROMPTS, SOLVERS, STEPS, build_flux, build_pipe, run

SOME = (True, True, False, True, False, False, True, False)
KINDS = ["residual", "velocity", "moved grid", "rectified", "no corrector", "every step", "grid only"]


def plan_of(pipe, kind: str) -> erta.Plan:
    """A plan of one kind of static method, without a calibration."""
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = nominal_sigmas(pipe.scheduler)
    plan = erta.Plan(mask=SOME, sigmas=sigmas, nominal_sigmas=sigmas)
    moved = longer_last_step(sigmas, np.append(sigmas[:-2], [sigmas[-2] * 1.3, 0]).astype(np.float32))
    numbers = np.random.default_rng(0).normal(1, 0.1, (2, STEPS, 1, 16)).repeat(2, axis=2)
    rectification = Rectification(gain=numbers[0], offset=numbers[1] - 1)
    return {
        "residual": plan,
        "velocity": replace(plan, reuse="velocity"),
        "moved grid": replace(plan, sigmas=moved),
        "rectified": replace(
            plan, sigmas=moved, branches=("cond", "uncond"), latent_shape=(16, 2, 4, 4), rectification=rectification
        ),
        "no corrector": replace(plan, corrector_at_reused=False),
        "every step": replace(plan, mask=(True,) * STEPS),
        "grid only": plan.grid_only(),
    }[kind]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_collapsed_is_the_hooked_run(solver, kind):
    """K steps of the solver = N steps under the hook. Mutants: x - r for x + r, the corrector of the step before, gains of
    another step, timesteps of the K-step grid in place of the nodes'."""
    if kind == "no corrector" and solver != "unipc":
        pytest.skip("only UniPC has a corrector")
    pipe = build_pipe(solver)
    plan = plan_of(pipe, kind)
    with erta.cached(pipe, plan):
        hooked = run(pipe, num_inference_steps=plan.num_steps)
    pipe.scheduler = scheduler = erta.collapse(pipe, plan)
    forwards = []
    handle = pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    found = run(pipe, num_inference_steps=plan.num_computed)
    handle.remove()
    assert len(forwards) == 2 * plan.num_computed and scheduler.solver.num_nominal == plan.num_steps
    assert (found - hooked).norm() / hooked.norm() < 1e-5
    assert scheduler.solver.memory <= 4 and scheduler.solver.velocity.shape[2] == (16 if kind == "rectified" else 1)


def test_collapsed_flux():
    """Packed latents, whose channels are last, and sigmas that the pipeline brings itself. Mutant: channels on axis 1."""
    pipe = build_flux()
    mask = (True, False, True, True, False, True)
    call = {**FLUX_CALL, "prompt": PROMPTS[0], "output_type": "latent"}
    pipe(**call, generator=torch.Generator().manual_seed(1))
    sigmas = nominal_sigmas(pipe.scheduler)
    numbers = np.random.default_rng(0).normal(1, 0.1, (2, 6, 1, 16))
    plan = erta.Plan(
        mask,
        sigmas,
        sigmas,
        latent_shape=(16, 16),
        rectification=Rectification(numbers[0], numbers[1] - 1),
        branches=("cond",),
    )
    with erta.cached(pipe, plan):
        hooked = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    own, pipe.scheduler = pipe.scheduler, erta.collapse(pipe, plan)
    few = {**call, "num_inference_steps": 4}
    found = pipe(**few, generator=torch.Generator().manual_seed(1)).images
    assert (found - hooked).norm() / hooked.norm() < 1e-5
    with pytest.raises(erta.ErtaError, match="leave out sigmas="):
        pipe(**few, sigmas=[1.0, 0.8, 0.5, 0.2])
    with pytest.raises(erta.SignatureMismatch, match="shifted by the image's size"):
        pipe(**{**few, "height": 128, "width": 128})
    assert type(own).from_config(pipe.scheduler.config).config.use_dynamic_shifting


def test_rectifier_by_branch_is_no_solver():
    """It says so, and takes one fitted to the guided output: near the hooked run, and not equal to it."""
    pipe = build_pipe()
    trajectories = erta.record(pipe, PROMPTS, **CALL)
    plan = erta.calibrate(pipe, PROMPTS, **CALL).plan(steps=4)
    with pytest.raises(erta.ErtaError, match="differs by guidance branch"):
        erta.collapse(pipe, plan)
    with erta.cached(pipe, plan):
        hooked = run(pipe)
    with erta.cached(pipe, replace(plan, rectification=None)):
        bare = run(pipe)
    pipe.scheduler = erta.collapse(pipe, plan, trajectories)
    found = run(pipe, num_inference_steps=4)
    assert pipe.scheduler.report["rectifier_of_guided_output"]
    assert 1e-6 < (found - hooked).norm() / hooked.norm() < (bare - hooked).norm() / hooked.norm()


def test_what_is_no_linear_solver_is_refused():
    pipe = build_pipe()
    plan = plan_of(pipe, "residual")
    with pytest.raises(erta.ErtaError, match="only site=output"):
        erta.collapse(pipe, replace(plan, site="blocks"))
    rectification = Rectification(np.ones((STEPS, 1, 1)), np.zeros((STEPS, 1, 1)), "sigmoid")
    with pytest.raises(erta.ErtaError, match="not linear"):
        erta.collapse(pipe, replace(plan, rectification=rectification))
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(erta.ErtaError, match="not linear in latents and outputs"):
        erta.collapse(pipe, plan)


def test_euler_and_unipc_by_hand():
    """Euler is one coefficient, the step's length; UniPC's corrector looks back two nodes; a reused Euler step by the formula.

    Mutants: the sign of the step, sigmas for their differences, the increment's coefficient of x left in.
    """
    sigmas = np.array([1.0, 0.8, 0.5, 0.2, 0.0], np.float32)
    euler = linear_solver(with_grid(SOLVERS["euler"](), sigmas), (True,) * 4)
    assert euler.memory == 1 and euler.kept == 0 and not euler.latent.any()
    np.testing.assert_allclose(euler.velocity[:, 0, 0], np.diff(sigmas), atol=1e-6)
    unipc = linear_solver(with_grid(SOLVERS["unipc"](), np.linspace(1, 0, 9)), (True,) * 8)
    assert unipc.memory == 3 and unipc.kept == 4
    reused = linear_solver(with_grid(SOLVERS["euler"](), sigmas), (True, False, True, True))
    # x1 = x0 + d0 v0, then v = x1 + v0 - x0 = (1 + d0) v0: one step of length d0 + d1 (1 + d0)
    np.testing.assert_allclose(reused.velocity[0, 0, 0], -0.2 - 0.3 * (1 - 0.2), atol=1e-6)
    assert reused.nodes == (0, 2, 3)


def test_two_pipelines_share_a_transformer_in_two_threads():
    """Each has its own solver, and each result is that of the pipeline alone. Mutant: history on the class."""
    pipes, alone = [], []
    transformer = build_pipe().transformer
    for steps, prompt in ((3, PROMPTS[0]), (5, PROMPTS[1])):
        pipe = build_pipe()
        pipe.transformer = transformer
        pipe.scheduler.set_timesteps(STEPS)
        sigmas = nominal_sigmas(pipe.scheduler)
        mask = tuple(step < steps for step in range(STEPS))
        pipe.scheduler = erta.collapse(pipe, erta.Plan(mask, sigmas, sigmas))
        pipes.append((pipe, prompt, steps))
        alone.append(run(pipe, prompt, num_inference_steps=steps))
    for _ in range(3):
        found: dict[int, torch.Tensor] = {}

        def work(place: int, found: dict[int, torch.Tensor] = found) -> None:
            pipe, prompt, steps = pipes[place]
            found[place] = run(pipe, prompt, num_inference_steps=steps)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[place], alone[place]) for place in range(2))


def test_saved_and_loaded(tmp_path):
    """The same latents, bit for bit, in a folder of kilobytes; the pipeline's own scheduler comes back from its config."""
    pipe = build_pipe()
    own, pipe.scheduler = pipe.scheduler, erta.collapse(pipe, plan_of(pipe, "rectified"))
    wanted = run(pipe, num_inference_steps=4)
    pipe.scheduler.save_pretrained(tmp_path / "solver")
    assert sum(path.stat().st_size for path in (tmp_path / "solver").iterdir()) < 50_000
    pipe.scheduler = erta.FittedScheduler.from_pretrained(tmp_path / "solver", pipe=pipe)
    assert torch.equal(run(pipe, num_inference_steps=4), wanted)
    with pytest.raises(erta.SignatureMismatch, match="model_class"):
        erta.FittedScheduler.from_pretrained(tmp_path / "solver", pipe=build_flux())
    again = type(own).from_config(pipe.scheduler.config)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in own.config.items() if k[0] != "_"
    }
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = type(pipe).from_pretrained(tmp_path / "pipe")
    assert isinstance(loaded.scheduler, erta.FittedScheduler)
    torch.testing.assert_close(run(loaded, num_inference_steps=4), wanted)


def broken(tmp_path, how: str):
    pipe = build_pipe()
    folder = tmp_path / "solver"
    scheduler = erta.collapse(pipe, plan_of(pipe, "residual"))
    scheduler.save_pretrained(folder)
    file = folder / "solver.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    elif how == "missing":
        file.unlink()
    elif how == "another schema":
        file.write_bytes(file.read_bytes().replace(b"erta.solver/1", b"erta.solver/9"))
    elif how == "edited":
        scheduler.solver.velocity[0, 0, 0] = np.nan
        scheduler.save_pretrained(folder)
    else:
        (folder / "scheduler_config.json").write_text("[]")
    return folder


@pytest.mark.parametrize("how", ["truncated", "missing", "another schema", "edited", "no config"])
def test_a_damaged_folder_is_named(tmp_path, how):
    folder = broken(tmp_path, how)
    with pytest.raises(erta.ErtaError, match=r"solver\.safetensors|scheduler_config\.json") as caught:
        erta.FittedScheduler.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_calls_that_do_not_fit_are_refused():
    """Another number of steps, a run from the middle of the grid, a step too many, foreign configurations."""
    pipe = build_pipe()
    own = pipe.scheduler
    pipe.scheduler = scheduler = erta.collapse(pipe, plan_of(pipe, "residual"))
    with pytest.raises(erta.ErtaError, match="num_inference_steps=4, not 50"):
        run(pipe, num_inference_steps=50)
    with pytest.raises(erta.ErtaError, match="begins at step 2 of 4"):
        scheduler.set_begin_index(2)
    with pytest.raises(erta.ErtaError, match=r"erta\.fit"):
        erta.FittedScheduler.from_config(own.config)
    scheduler.set_timesteps(4)
    with pytest.raises(erta.ErtaError, match="not one of this solver's nodes"):
        scheduler.step(torch.zeros(1, 16, 2, 4, 4), 3.5, torch.zeros(1, 16, 2, 4, 4))
    with pytest.raises(erta.ErtaError, match="prediction_type"):
        erta.FittedScheduler(scheduler.solver, UniPCMultistepScheduler(prediction_type="epsilon"))


def test_a_rule_that_looks_back_at_nothing_begins_anywhere():
    """Euler's rule needs no history, so image-to-image may begin at any node. Mutant: refused whatever the rule."""
    pipe = build_pipe("euler")
    scheduler = erta.collapse(pipe, plan_of(pipe, "velocity"))
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    x, v = torch.ones(1, 16, 2, 4, 4), torch.full((1, 16, 2, 4, 4), 2.0)
    (found,) = scheduler.step(v, scheduler.timesteps[2], x, return_dict=False)
    between = float(scheduler.sigmas[3] - scheduler.sigmas[2])
    torch.testing.assert_close(found, x + between * v)
    assert scheduler.step_index == 3
    noised = scheduler.scale_noise(x, scheduler.timesteps[2:3], v)
    torch.testing.assert_close(noised, (1 + scheduler.sigmas[2]) * x)


def test_history_is_let_go():
    """At most the latents that later rules need are held between two steps. Mutant: all of them."""
    pipe = build_pipe()
    pipe.scheduler = scheduler = erta.collapse(pipe, plan_of(pipe, "every step"))
    held = []

    def look(pipe, step, timestep, values):
        held.append(sum(value is not None for values in scheduler._history for value in values))
        return {}

    pipe(prompt=PROMPTS[0], callback_on_step_end=look, output_type="latent", **CALL)
    assert max(held) == scheduler.solver.kept == 4 and held[-1] == 0
