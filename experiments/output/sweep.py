"""A sweep (`run.py -m`): found again when it was interrupted, its finished runs kept, and one table and plot at its end.

Each run notes in `members/` of the sweep's folder how it stands, in a file of its own, so that this holds for every launcher:
runs may share the work of a sweep in several processes, or on several machines with one file system. What takes seconds to
import is imported where it is used: every command line imports this file, `--help` too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hydra.conf import HydraConf
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from erta.errors import ErtaError
from experiments.output import console

SWEEP_FILE = "sweep.json"
NO_MATTER = (
    "hydra.sweep.dir",
    "hydra/launcher",
    "hydra.launcher",
    "hydra.mode",
    "resume",
    "wait",
    "wandb",
)  # to what is swept
GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class Refused(BaseException):
    """A sweep that cannot begin; its cause says why. Hydra turns every `Exception` of a callback into a warning."""


class Begin(Callback):
    """Hydra's callback (`hydra.callbacks` in conf/config.yaml): opens the folder of a sweep before its first run.

    Attributes:
        folder: of the sweep that this process runs; None: it runs none.
    """

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The folder of an unfinished sweep with the same overrides, or the one that Hydra chose. Raises Refused."""
        try:
            Begin.folder = _open_sweep(config)
        except (ErtaError, OSError) as error:
            raise Refused from error


def _open_sweep(config: DictConfig) -> Path:
    from analysis import sweeps
    from experiments.output.files import read_object, write_json
    from experiments.output.run_folder import goes_on, outputs_root

    overrides = config.hydra.overrides
    given = [*overrides.hydra, *overrides.task]
    deciding = sorted(one for one in given if not one.lstrip("+~").startswith(NO_MATTER))
    if config.hydra.sweeper._target_ != GRID and config.sweep.target_psnr_db is None:
        raise ErtaError("this sweeper searches: say for which PSNR, as in sweep.target_psnr_db=45")
    folder = Path(config.hydra.sweep.dir).absolute()
    if not any(one.startswith("hydra.sweep.dir=") for one in given):
        while (folder / SWEEP_FILE).exists():  # two sweeps in one second
            folder = folder.with_name(f"{folder.name}+")
        for path in sorted(outputs_root(folder).glob(f"**/{SWEEP_FILE}"), reverse=True):
            state = read_object(path)
            if goes_on(config) and state.get("overrides") == deciding and not state.get("finished"):
                folder = path.parent
                console.note(f"going on with the sweep in {folder}")
                break
        with read_write(config.hydra):  # of this process, and of the runs, which are composed anew from the overrides
            config.hydra.sweep.dir = str(folder)
            overrides.hydra.append(f"hydra.sweep.dir='{folder}'")
    try:
        (folder / sweeps.MEMBERS).mkdir(parents=True, exist_ok=True)
        for old in (folder / sweeps.MEMBERS).glob("*.json"):  # of an earlier command: the runs' folders stay
            old.unlink()
        write_json(folder / SWEEP_FILE, {"overrides": deciding, "finished": False})
    except OSError as error:
        raise ErtaError(
            f"cannot write to {folder}: {error.strerror}. Choose another with hydra.sweep.dir=FOLDER"
        ) from error
    return folder


class Member:
    """A run of a sweep, seen from within: where it lies and how it stands."""

    def __init__(self, hydra: HydraConf) -> None:
        """Of Hydra's own configuration of this run."""
        self._sweep = Path(hydra.sweep.dir).absolute()
        self._folder = Path(hydra.runtime.output_dir)
        self._number, self._overrides = int(hydra.job.num), list(hydra.overrides.task)

    def note(self, state: Literal["started", "finished", "failed"], error: str | None = None) -> None:
        """Write down how it stands, for the table at the end."""
        from analysis import records, sweeps
        from experiments.output.files import write_json

        file = self._sweep / sweeps.MEMBERS / f"{self._number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = os.path.relpath(self._folder, self._sweep)
        entry = sweeps.Member(number=self._number, overrides=self._overrides, folder=folder, state=state, error=error)
        write_json(file, records.to_json(entry))

    @contextmanager
    def open(self, cfg: DictConfig) -> Iterator[tuple[Path, bool]]:
        """Inside the `with`: its folder, ready to write and this process's alone, and whether it holds this run, finished.

        Looked for in the sweep's folder alone, so that a sweep lies in one place. Raises ErtaError as `open_folder` does.
        """
        from analysis import sweeps
        from experiments.output.files import read_object
        from experiments.output.run_folder import STATE_FILE, config_hash, goes_on, open_folder, run_folders

        digest, fresh = config_hash(cfg), self._folder
        taken = {one.folder for one in sweeps.read_members(self._sweep) if one.number != self._number}
        for path in sorted(run_folders(self._sweep)) if goes_on(cfg) else ():
            state, is_free = read_object(path / STATE_FILE), os.path.relpath(path, self._sweep) not in taken
            if state.get("config_hash") == digest and (state.get("finished") or is_free):
                if state.get("finished"):
                    self._folder = path
                    self.note("started")
                    yield path, True
                    return
                fresh = path
                break
        while read_object(fresh / STATE_FILE).get("config_hash", digest) != digest:  # of an earlier command
            fresh = fresh.with_name(f"{fresh.name}+")
        self._folder = fresh
        with open_folder(cfg, fresh, chosen=True) as folder:
            self.note("started")
            yield folder, False


def objective(cfg: DictConfig, folder: Path) -> float | None:
    """What a sweeper makes small: how far, in dB, a finished run's PSNR is from `sweep.target_psnr_db`; None without one.

    Identical samples are infinitely far.
    """
    from analysis import records

    if cfg.sweep.target_psnr_db is None:
        return None
    record = records.read(folder)
    psnr = record.metrics["psnr_db"] if isinstance(record, records.MainRecord) else None
    return math.inf if psnr is None else abs(psnr - cfg.sweep.target_psnr_db)


@contextmanager
def shown_at_its_end() -> Iterator[None]:
    """After what is done inside: if that was a sweep, its table and plot. Raises ErtaError if some of its runs failed."""
    Begin.folder, trouble = None, None
    try:
        yield
    except Refused as refused:
        raise (refused.__cause__ or refused) from None
    except Exception as error:
        if type(error).__module__.startswith("submitit."):
            raise ErtaError(
                "a job ended without a word: it was killed, or its node is gone. What was finished is kept: the same command goes "
                "on, with wait=true while others of its jobs are still at work."
            ) from error
        if Begin.folder is None or not _has_failed(Begin.folder):
            raise
        trouble = error  # of Hydra, as its runs failed: they are named
    if Begin.folder is not None:
        _show(Begin.folder, trouble)


def _has_failed(folder: Path) -> bool:
    from analysis import records, sweeps

    try:
        return any(member.state == "failed" for member in sweeps.read_members(folder))
    except records.RecordError:  # no run has begun
        return False


def _show(folder: Path, trouble: Exception | None) -> None:
    from analysis import sweeps
    from experiments.output.files import read_json, write_json

    sweep = sweeps.load(folder)
    sweeps.show(sweep, console.table, console.note)
    if len(sweep.failed):
        raise ErtaError(
            f"{len(sweep.failed)} of {len(sweep.frame)} runs failed. "
            "The same command tries them again and keeps the others."
        ) from trouble
    write_json(folder / SWEEP_FILE, {**(read_json(folder / SWEEP_FILE) or {}), "finished": True})
