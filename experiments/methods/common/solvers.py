"""What solvers in the scheduler's place share: the arm, recorded trajectories, and what is kept of a fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

import erta
from erta.errors import ErtaError
from erta.fitted_scheduler import FittedScheduler
from erta.scheduler import with_grid
from erta.signature import check_signature
from erta.solver import Solver, linear_solver
from erta.solver_files import APART, TABLES, MadeFor
from experiments.harness.arm import Arm
from experiments.harness.calibrations import CALIBRATION_SEED, kept_path
from experiments.harness.kept import kept, note_spent
from experiments.harness.setup import Setup
from experiments.output import console
from experiments.output.console import progress_bar


def scheduler_arm(
    setup: Setup, scheduler: Any, num_steps: int, report: dict[str, Any], solver: Solver | None = None
) -> Arm:
    """The plain pipeline with another scheduler."""

    apart = solver is not None and solver.contrast is not None

    @contextmanager
    def attach(pipe: Any) -> Iterator[None]:
        own, pipe.scheduler = pipe.scheduler, scheduler
        try:
            with erta.branches_apart(pipe) if apart else nullcontext():
                yield
        finally:
            pipe.scheduler = own

    kwargs = {**setup.kwargs, "num_inference_steps": num_steps}
    return Arm(None, kwargs, attach=attach, report=report, changes_solver=True, solver=solver)


def solver_arm(setup: Setup, scheduler: FittedScheduler) -> Arm:
    """The arm of a solver; its nodes are reported as the mask of a static method."""
    solver = scheduler.solver
    mask = [int(step in solver.nodes) for step in range(solver.num_nominal)]
    report = {**solver.report, "policy": setup.cfg.cache.name, "mask": mask, "kept_latents": solver.kept}
    return scheduler_arm(setup, scheduler, solver.num_steps, report, solver)


def solver_of(setup: Setup, arm: Arm) -> Solver:
    """The linear solver that an arm amounts to. Raises ErtaError for one that decides while it runs."""
    if arm.solver is not None:
        if arm.solver.contrast is not None:
            raise ErtaError(
                f"cache={setup.cfg.cache.name} weighs the guidance branches apart: no rule of guided outputs says what it does"
            )
        return arm.solver
    if arm.plan is not None:
        rectifies = arm.plan.rectification is not None and not all(arm.plan.mask)
        return erta.collapse(setup.pipe, arm.plan, get_trajectories(setup) if rectifies else None).solver
    if arm.attach is not None:
        raise ErtaError(
            f"cache={setup.cfg.cache.name} is no linear solver: it decides while it runs, or inside the transformer"
        )
    sigmas = arm.sigmas(setup)
    return linear_solver(with_grid(setup.pipe.scheduler, sigmas), (True,) * (len(sigmas) - 1))


def get_trajectories(setup: Setup) -> erta.Trajectories:
    """Uncached trajectories of the calibration prompts: made earlier here, or recorded now."""
    prompts = setup.calibration_prompts
    return kept_trajectories(setup, "trajectories", prompts, [CALIBRATION_SEED + k for k in range(len(prompts))])


def kept_trajectories(setup: Setup, name: str, prompts: list[str], seeds: list[int]) -> erta.Trajectories:
    """Recorded trajectories of some prompts, kept for the next run. Finished prompts survive an interruption.

    Of several processes that want the same, one records and the others wait.
    """
    made_for = {key: value for key, value in setup.signature.items() if key != "site"}
    digest = hashlib.sha256(json.dumps([made_for, setup.size, prompts, seeds, setup.kwargs]).encode()).hexdigest()[:10]
    path = kept_path(f"{setup.cfg.model.name}-{name}-{digest}.safetensors")
    partial = path.with_name(path.stem + ".unfinished.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        done = _usable(path, made_for)
        if done is None:
            done = _record_missing(setup, prompts, seeds, partial, _usable(partial, made_for))
            done.save(path)
            partial.unlink(missing_ok=True)
    note_spent(path.name, done.record["seconds"])
    return done


def _record_missing(
    setup: Setup, prompts: list[str], seeds: list[int], partial: Path, done: erta.Trajectories | None
) -> erta.Trajectories:
    """`done`, if any, and the prompts that it lacks."""
    start = 0 if done is None else done.num_prompts + len(done.record["skipped"])
    with progress_bar() as bar:
        task = bar.add_task("record uncached trajectories", total=len(prompts), completed=start)

        def keep(count: int, so_far: erta.Trajectories) -> None:
            (so_far if done is None else done.merge(so_far)).save(partial)
            bar.advance(task)

        if start < len(prompts):
            made = erta.record(setup.pipe, prompts[start:], seed=seeds[start:], on_prompt=keep, **setup.kwargs)
            return made if done is None else done.merge(made)
    assert done is not None
    return done


def kept_solver(setup: Setup, name: str, made_with: list[Any], make: Callable[[], FittedScheduler]) -> FittedScheduler:
    """`make()`, or the solver that an earlier run made for the same model, grid, guidance, size, prompts and `made_with`."""

    def tables() -> dict[str, Any]:
        made = make()
        solver = made.solver
        return {
            "nodes": list(solver.nodes),
            **{key: getattr(solver, key).tolist() for key in {*TABLES, *solver.tables}},
            "made_for": vars(made.made_for),
            "report": solver.report,
        }

    found = kept(setup, name, made_with, tables)
    shape, rest = found["made_for"]["latent_shape"], {k: v for k, v in found["made_for"].items() if k != "latent_shape"}
    made_for = MadeFor(latent_shape=shape and tuple(shape), **rest)
    arrays = {key: np.array(found[key]) for key in (*TABLES, APART) if key in found}
    for key in ("sigmas", "nominal_sigmas", "timesteps"):
        if arrays[key].dtype == np.float64:  # as schedulers have them
            arrays[key] = arrays[key].astype(np.float32)
    return FittedScheduler(
        Solver(tuple(found["nodes"]), report=found["report"], **arrays), setup.pipe.scheduler, made_for
    )


def step_bar(description: str) -> Any:
    """A progress bar over the steps of a fit, as a context that yields what `erta.fit` calls."""

    @contextmanager
    def shown() -> Iterator[Callable[[int, int], None]]:
        with progress_bar() as bar:
            task = bar.add_task(description, total=None)

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            yield advance

    return shown()


def _usable(path: Path, made_for: dict[str, Any]) -> erta.Trajectories | None:
    if not path.is_file():
        return None
    try:
        found = erta.Trajectories.load(path)
        check_signature(found.signature, made_for)
    except ErtaError as error:
        console.note(f"{path} cannot be used: {error}")
        return None
    return found
