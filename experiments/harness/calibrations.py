"""Find a calibration that fits, or make one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from filelock import FileLock

import erta
from erta.errors import ErtaError, SignatureMismatch
from erta.signature import check_signature
from experiments.harness.config import shard_range
from experiments.harness.setup import Setup
from experiments.models.load import ASSETS
from experiments.output import console, ranks
from experiments.output.console import progress_bar

MADE_HERE = Path("outputs/calibrations")
CALIBRATION_SEED = 1_000_000  # far from every test seed
FEW_PARTS = 50  # up to which no progress of merging is shown


def check_fits(calibration: erta.Calibration, setup: Setup) -> None:
    """Raise SignatureMismatch if the calibration was made for another model, grid, guidance or size."""
    # the setup's leaves it out where it is off, so that files of earlier versions keep their names
    check_signature(calibration.signature, {"true_cfg_scale": 1.0, **setup.signature})
    asked = setup.size
    made_for = calibration.record.get("size", asked)
    if made_for != asked:
        raise SignatureMismatch("size", made_for, asked)


def get_calibration(setup: Setup) -> erta.Calibration:
    """The calibration of `cache.site`, found or made at the first call: the file that was named, else the shipped one, else
    one made earlier here, else a new one.
    """
    site = setup.cfg.cache.site
    if site not in setup.calibrations:
        setup.calibrations[site] = _find_or_make(setup)
    return setup.calibrations[site]


def _find_or_make(setup: Setup) -> erta.Calibration:
    if setup.cfg.calibration.path is not None:
        calibration = erta.Calibration.load(setup.cfg.calibration.path)
        sigmas = setup.grid.sigmas
        if setup.cfg.calibration.allow_interpolation and len(sigmas) - 1 != calibration.num_steps:
            console.note(f"calibration: interpolated from {calibration.num_steps} to {len(sigmas) - 1} steps")
            calibration = erta.interpolate(calibration, sigmas)
        check_fits(calibration, setup)
        return calibration
    made_here = ranks.same(lambda: kept_path(f"{setup.cfg.model.name}-{_key(setup)}.safetensors"))
    with locked(made_here):
        path = ranks.same(lambda: _found(setup, made_here))
        return make_calibration(setup, made_here) if path is None else erta.Calibration.load(path)


def kept_path(name: str) -> Path:
    """Where what calibration prompts led to is kept under this name: where an earlier run kept it, else where this one can.

    In a working folder that cannot be written, that is the user's cache.
    """
    places = (MADE_HERE, Path.home() / ".cache" / "erta" / "calibrations")
    there = [place for place in places if (place / name).is_file()]
    return [*there, *(place for place in places if _can_write(place)), MADE_HERE][0] / name


def _can_write(folder: Path) -> bool:
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside the `with`, no other process makes `path`: of several that want the same, one makes it and the others wait."""
    with ExitStack() as held:

        def hold() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path.with_suffix(".lock")))

        ranks.same(hold)
        yield


def _found(setup: Setup, made_here: Path) -> Path | None:
    """The shipped calibration if it fits, else the one that an earlier run made; None if there is none."""
    wanted = setup.calibration_prompts
    for path in (*sorted((ASSETS / setup.cfg.model.name).glob("calibration*.safetensors")), made_here):
        if not path.is_file():
            continue
        try:
            calibration = erta.Calibration.load(path)
            check_fits(calibration, setup)
        except ErtaError as error:
            if path == made_here and not isinstance(error, SignatureMismatch):
                console.note(f"{path} cannot be used: {error}")
            continue
        if _tried(calibration, wanted) == len(wanted) and calibration.record["window"] == setup.cfg.calibration.window:
            console.note(f"calibration: {path} ({len(wanted)} prompts)")
            return path
    return None


def make_calibration(setup: Setup, path: Path) -> erta.Calibration:
    """Calibrate with a progress bar and keep the result at `path`. Ranks share the prompts.

    A prompt at a time, each kept beside `path` until all are done: nothing finished is made again, and prompts are merged in
    their order, so that neither an interruption nor the number of ranks changes a bit of the result.

    Raises NonFiniteError if no prompt is left.
    """
    prompts = setup.calibration_prompts
    parts = _Parts(path.with_name(f"{path.stem}.unfinished"), setup, prompts)
    which = shard_range(setup.cfg.calibration.shard, len(prompts))
    todo = ranks.same(lambda: [number for number in which if not parts.has(number)])
    with progress_bar() as bar:
        mine = ranks.share(todo)
        task = bar.add_task("calibrate", total=len(mine) + len(which) - len(todo), completed=len(which) - len(todo))
        for number in mine:
            parts.make(number)
            bar.advance(task)
    ranks.wait_for_all()

    def merge() -> None:
        parts.merged(which).save(path)
        shutil.rmtree(parts.folder, ignore_errors=True)

    ranks.same(merge)
    return erta.Calibration.load(path)


@dataclass(frozen=True)
class _Parts:
    """Calibrations of single prompts, which lie in a folder until they are one."""

    folder: Path
    setup: Setup
    prompts: list[str]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def left_out(self, number: int) -> Path:
        """Is there if the prompt's outputs are not finite; holds why."""
        return self.folder / f"{number:05d}.txt"

    def has(self, number: int) -> bool:
        """Whether a prompt is done; a part that is damaged, or of something else, is none."""
        return self.left_out(number).is_file() or self.load(number) is not None

    def load(self, number: int) -> erta.Calibration | None:
        try:
            part = erta.Calibration.load(self.path(number))
            check_fits(part, self.setup)
        except ErtaError:
            return None
        made_for = [part.record["prompts"], part.record["window"], part.record["first_seed"]]
        wanted = [[self.prompts[number]], self.setup.cfg.calibration.window, CALIBRATION_SEED + number]
        return part if made_for == wanted else None

    def make(self, number: int) -> None:
        setup = self.setup
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            made = erta.calibrate(
                setup.pipe,
                [self.prompts[number]],
                site=setup.cfg.cache.site,
                window=setup.cfg.calibration.window,
                seed=CALIBRATION_SEED + number,
                **setup.kwargs,
            )
        except erta.NonFiniteError as error:
            warnings.warn(f"prompt {number + 1}: {error}; it is left out of the calibration", stacklevel=2)
            self.left_out(number).write_text(f"{error}\n", encoding="utf-8")
        else:
            made = replace(made, record={**made.record, "size": setup.size})
            made.save(self.path(number))

    def merged(self, which: range) -> erta.Calibration:
        """All of them, in the order of the prompts. Raises NonFiniteError if none is left."""
        with progress_bar(len(which) > FEW_PARTS) as bar:
            numbers = bar.track(which, description="merge prompts", total=len(which))
            made = [part for number in numbers if (part := self.load(number)) is not None]
        if not made:
            raise erta.NonFiniteError(self.left_out(which[0]).read_text(encoding="utf-8").strip())
        skipped = [self.prompts[number] for number in which if self.left_out(number).is_file()]
        whole = reduce(erta.Calibration.merge, made)
        return replace(whole, record={**whole.record, "skipped": skipped})


def closed_loop_plan(setup: Setup, plan: erta.Plan) -> erta.Plan:
    """`plan` with its rectifier fitted along its own trajectory on the calibration prompts; kept for the next run."""
    prompts = setup.calibration_prompts
    key = hashlib.sha256(
        json.dumps([plan.to_json(), prompts, setup.size, setup.cfg.cache.rectifier]).encode()
    ).hexdigest()
    path = kept_path(f"{setup.cfg.model.name}-closed-{key[:10]}.json")
    if path.is_file():
        try:
            return erta.Plan.load(path)
        except ErtaError as error:
            console.note(f"{error}; it is made anew")
    with progress_bar() as bar:
        task = bar.add_task("fit the rectifier along the plan", total=len(prompts))
        fitted = erta.refit(
            setup.pipe,
            plan,
            prompts,
            seed=CALIBRATION_SEED,
            rectifier=setup.cfg.cache.rectifier,
            on_prompt=lambda index: bar.advance(task),
            **setup.kwargs,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fitted.save(path)
    return fitted


def _tried(calibration: erta.Calibration, prompts: list[str]) -> int:
    """How many of these prompts, from the first on, a calibration is made of or had to leave out; 0 if of others."""
    made_of, skipped = calibration.record["prompts"], calibration.record["skipped"]
    count = len(made_of) + len(skipped)
    return count if [p for p in prompts[:count] if p not in skipped] == made_of else 0


def _key(setup: Setup) -> str:
    parts = [setup.signature, setup.size, setup.calibration_prompts, setup.cfg.calibration.window]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
