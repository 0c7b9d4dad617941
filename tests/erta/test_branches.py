"""Solvers that see how the guidance branches differ."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import erta
from erta.fitted_scheduler import FittedScheduler
from erta.least_squares import CONTRASTS, TERMS
from erta.scheduler import nominal_sigmas
from tests.erta.test_fit import MANY
from tests.erta.test_sharing import Boom, abort, beside
from tests.pipelines import CALL, LTX_CALL, build_flux, build_ltx, build_pipe, run

APART = erta.FitOptions(branches="apart", placement="planned", baseline=False)


def guided_at(pipe, scale: float, wanted: float) -> FittedScheduler:
    """Euler's rule on the grid of the pipeline's last run, which at one guidance scale gives what another gives."""
    grid = nominal_sigmas(pipe.scheduler)
    steps = np.diff(grid.astype(np.float64))[:, None, None]
    solver = erta.Solver(
        nodes=tuple(range(len(steps))),
        sigmas=grid,
        timesteps=np.array(pipe.scheduler.timesteps),
        nominal_sigmas=grid,
        velocity=steps,
        latent=0 * steps,
        offset=0 * steps[:, 0],
        contrast=(wanted - scale) * steps,
    )
    return FittedScheduler(solver, pipe.scheduler)


@pytest.mark.parametrize(("build", "call"), [(build_pipe, CALL), (build_ltx, LTX_CALL)])
def test_the_contrast_is_what_guidance_adds(build, call):
    """Two forwards a step, or both branches in one batch. Mutants: uncond - cond; the contrast of the step before; of one sample
    of the batch."""
    pipe = build("euler") if build is build_pipe else build()
    call = {**call, "guidance_scale": 3.0}

    def generate(**changes):
        made = pipe(
            prompt=MANY[:2], generator=torch.Generator().manual_seed(1), output_type="latent", **{**call, **changes}
        )
        return made.frames

    wanted = generate(guidance_scale=5.0)
    own, plain = pipe.scheduler, generate()
    pipe.scheduler = guided_at(pipe, 3.0, 5.0)
    with erta.branches_apart(pipe):
        found, again = generate(), generate()
    error = (found - wanted).norm() / wanted.norm()
    assert error < 1e-4 < (plain - wanted).norm() / wanted.norm() and torch.equal(found, again)
    pipe.scheduler = own
    assert torch.equal(generate(), plain) and "forward" not in pipe.transformer.__dict__


def test_a_fit_with_branches_apart(tmp_path):
    """Runs as it was fitted, gains on the prompts that it was fitted to, and is written and read. Mutants: a term's coefficient
    given to another; the contrast of another call of the fit; the table left out of the file."""
    pipe = build_pipe("unipc")
    seen = erta.record(pipe, MANY, **CALL)
    made = erta.fit(pipe, seen, steps=3, options=replace(APART, terms=6, ridge=1e-9))
    report, solver = made.report, made.solver
    together = erta.fit(pipe, seen, steps=3, options=replace(APART, branches="together", terms=6, ridge=1e-9)).report
    assert report["on_calibration"]["mean_psnr_db"] > together["on_calibration"]["mean_psnr_db"] + 0.2
    assert report["forwards"] == together["forwards"] == 2 * 3 * 4 and solver.kept <= 6
    assert report["steps"][2]["terms"] == [*TERMS, *CONTRASTS] and solver.contrast is not None
    made.save_pretrained(tmp_path)
    pipe.scheduler = FittedScheduler.from_pretrained(tmp_path, pipe=pipe)
    assert np.array_equal(pipe.scheduler.solver.contrast, solver.contrast)
    with erta.branches_apart(pipe):
        for prompt, error in enumerate(report["on_calibration"]["latent_error"]):
            end = run(pipe, MANY[prompt], seed=prompt, num_inference_steps=3).flatten()[seen.positions].numpy()
            wanted = seen.latents[prompt, -1]
            assert np.linalg.norm(end - wanted) / np.linalg.norm(wanted) == pytest.approx(error, rel=1e-2)
    chosen = erta.fit(build_pipe("unipc"), seen, steps=3, options=APART).report
    assert len(chosen["predicted"]["psnr_db"]) == 4 and any("d" in step["terms"] for step in chosen["steps"])
    alone, batched = (
        erta.fit(
            build_pipe("unipc"), seen, steps=3, options=replace(APART, terms=6, ridge=1e-3), batch_size=size
        ).solver
        for size in (1, 3)
    )
    for name, table in alone.tables.items():
        np.testing.assert_allclose(batched.tables[name], table, atol=1e-4)


def test_a_step_is_the_rule():
    """By hand, with a contrast that lacks an axis, as some pipelines have it. Mutants: the contrast of another node; one that is
    spread over an axis that it does not have."""
    pipe = build_pipe("euler")
    run(pipe)
    made = guided_at(pipe, 4.0, 6.0)
    values = torch.randn(3, 1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    made.contrast_of = lambda: values[2][0]
    found = made.step(values[0], made.timesteps[0], values[1], return_dict=False)[0]
    wanted = made.solver.advance(0, [values[1]], [values[0]], [values[2]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(erta.ErtaError, match="give their contrasts too"):
        made.solver.advance(0, [values[1]], [values[0]])
    made.contrast_of = lambda: values[2][:, :, :1]
    with pytest.raises(
        erta.ErtaError, match=r"answers with \(1, 16, 1, 4, 4\) and the scheduler is given \(1, 16, 2, 4, 4\)"
    ):
        made.step(values[0], made.timesteps[1], values[1])


def test_others_are_left_alone():
    """Another pipeline of the transformer, in another thread too; an aborted call. Mutants: outputs of another's forwards noted;
    a step's outputs left for the next call."""
    pipe = build_pipe("euler")
    other = beside(pipe)
    plain = run(other)
    pipe.scheduler = guided_at(pipe, 4.0, 6.0)
    wrong: list[str] = []

    def meanwhile() -> None:
        for _ in range(6):
            if not torch.equal(run(other), plain):
                wrong.append("another tensor")

    with erta.branches_apart(pipe):
        alone = run(pipe)
        thread = threading.Thread(target=meanwhile)
        thread.start()
        for _ in range(4):
            with pytest.raises(Boom):
                run(pipe, callback_on_step_end=abort)
            if not torch.equal(run(pipe), alone):
                wrong.append("disturbed")
        thread.join()
    assert not wrong


def test_what_cannot_be():
    """Each with a line that says what to do."""
    pipe = build_pipe("euler")
    run(pipe)
    with pytest.raises(erta.InstallError, match="fitted with branches='apart'"), erta.branches_apart(pipe):
        pass
    own, pipe.scheduler = pipe.scheduler, guided_at(pipe, 4.0, 6.0)
    with pytest.raises(erta.ErtaError, match="inside `with erta.branches_apart"):
        run(pipe)
    with erta.branches_apart(pipe):
        with pytest.raises(erta.ErtaError, match=r"two guidance branches apart, and this step had 1 \(cond\)"):
            run(pipe, guidance_scale=1.0)
        with pytest.raises(erta.InstallError, match="installed on this pipeline already"), erta.branches_apart(pipe):
            pass
        apart, pipe.scheduler = pipe.scheduler, own
        with pytest.raises(erta.InstallError, match="fitted with branches='apart'"):
            run(pipe)
        pipe.scheduler = apart
        run(pipe)
    flux = build_flux()
    with pytest.raises(erta.ErtaError, match="two guidance branches"):
        seen = erta.record(
            flux, MANY[:2], num_inference_steps=4, guidance_scale=3.5, height=64, width=64, max_sequence_length=16
        )
        erta.fit(flux, seen, steps=2, options=APART)
    for wrong, said in (({"loop": "open"}, "loop must be closed"), ({"branches": "both"}, "branches must be one of")):
        with pytest.raises(erta.ErtaError, match=said):
            replace(APART, **wrong)
    with pytest.raises(erta.ErtaError, match="terms must be 1 to 6"):
        erta.FitOptions(terms=9)
