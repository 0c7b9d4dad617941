"""The run folder: found again when unfinished, written so that nothing finished is lost."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from analysis import records
from erta.errors import ErtaError
from experiments.output import console
from experiments.output.files import read_object, write_json
from experiments.output.owner import LOCK, OWNER, OwnedError, owning

STATE_FILE = "state.json"
RESULTS = (records.RECORD, records.LEFT_OUT)  # with all *.jsonl: what a new run in an old folder must not find
BEGINNINGS = frozenset({STATE_FILE, LOCK, OWNER, ".hydra"})
NOT_SEARCHED = frozenset({"samples", "uncached", "figures", "wandb", ".hydra", "calibrations"})
NOT_HASHED = ("resume", "wait", "wandb", "sweep", "experiment", "cache.about")  # dotted; the experiment's name is


def as_plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain data, interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def config_hash(cfg: DictConfig) -> str:
    """Digest of everything in the configuration that decides the result."""
    plain = as_plain(cfg)
    deciding = {"experiment_name": plain["experiment"]["name"], **plain}
    for key in ("workers", "reference", "only"):
        deciding.get(plain["experiment"]["name"], {}).pop(key, None)
    for key in NOT_HASHED:
        *groups, last = key.split(".")
        functools.reduce(dict.__getitem__, groups, deciding).pop(last)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def open_folder(cfg: DictConfig, fresh: Path, chosen: bool) -> Iterator[Path]:
    """Inside the `with`, this process's alone: the folder of an unfinished run of this configuration, or `fresh`, ready to write.

    Args:
        fresh: the folder that Hydra made for this run.
        chosen: it has a name (hydra.run.dir, or the experiment's own), so no other folder is looked at.

    A folder in which nothing was finished is taken away if the run fails. Raises ErtaError if the folder holds another run, is
    at work in another process (see `owner`) or cannot be written.
    """
    digest = config_hash(cfg)
    with ExitStack() as held:
        try:
            folder = _chosen(cfg, fresh, digest, held) if chosen else _found(cfg, fresh, digest, held)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ErtaError(
                f"cannot write to {fresh}: {reason}. Choose another folder with hydra.run.dir=FOLDER."
            ) from error
        try:
            yield folder
        except BaseException:
            tidy(folder)
            raise


def _found(cfg: DictConfig, fresh: Path, digest: str, held: ExitStack) -> Path:
    """An unfinished run of this configuration below `outputs`, the newest first, else a new folder."""
    for folder in sorted(run_folders(outputs_root(fresh)), reverse=True) if goes_on(cfg) else ():
        if _is_unfinished(folder, digest):
            with ExitStack() as one:
                one.enter_context(owning(folder, digest, cfg.wait))
                if _is_unfinished(folder, digest):  # and not finished while we waited
                    held.push(one.pop_all())
                    return _begin(cfg, folder, digest)
    while True:
        with ExitStack() as one:
            try:
                one.enter_context(owning(fresh, digest, wait=False))
            except OwnedError as error:  # of two runs in one second
                if goes_on(cfg) and (error.owner is None or error.owner.config_hash == digest):
                    raise
            else:
                if not (fresh / STATE_FILE).exists():
                    held.push(one.pop_all())
                    return _begin(cfg, fresh, digest)
        fresh = fresh.with_name(f"{fresh.name}+")


def _chosen(cfg: DictConfig, folder: Path, digest: str, held: ExitStack) -> Path:
    """The folder that has a name: an unfinished run of this configuration goes on there, a finished one starts anew."""
    known = read_object(folder / STATE_FILE).get("config_hash")
    if known not in (None, digest):
        raise ErtaError(f"{folder} holds another run: choose another folder with hydra.run.dir=FOLDER, or delete it")
    held.enter_context(owning(folder, digest, cfg.wait))
    return _begin(cfg, folder, digest)


def _begin(cfg: DictConfig, folder: Path, digest: str) -> Path:
    state = read_object(folder / STATE_FILE)
    if state.get("finished") or (state and not goes_on(cfg)):
        for path in [*folder.glob("*.jsonl"), *(folder / name for name in RESULTS)]:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "uncached", ignore_errors=True)
        state = {}
    forces = str(cfg.resume).lower() == "force"
    write_json(folder / STATE_FILE, {**state, "config_hash": digest, "finished": False, "forces": forces})
    return folder


def goes_on(cfg: DictConfig) -> bool:
    """Whether an unfinished run is continued: `resume` is true or force."""
    return str(cfg.resume).lower() != "false"


def _is_unfinished(folder: Path, digest: str) -> bool:
    state = read_object(folder / STATE_FILE)
    return state.get("config_hash") == digest and not state.get("finished")


def run_folders(root: Path) -> Iterator[Path]:
    """Every folder below `root` that holds a run; what lies in samples and the like is not looked through."""
    for here, below, files in os.walk(root):
        below[:] = sorted(set(below) - NOT_SEARCHED)
        if STATE_FILE in files:
            yield Path(here)


def tidy(folder: Path) -> None:
    """Take a folder away in which nothing but the beginning of a run stands, and the empty ones above it below `outputs`."""
    try:
        there = {path.name for path in folder.iterdir() if not _is_empty(path)}
    except OSError:
        return
    if there - BEGINNINGS:
        return
    for name in sorted(there | {path.name for path in folder.iterdir()}):
        path = folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    root, here = outputs_root(folder), Path.cwd()
    for one in (folder, *(parent for parent in folder.parents if parent.is_relative_to(root) and root != folder)):
        if one == here or one in here.parents:
            return
        with suppress(OSError):
            one.rmdir()


def _is_empty(path: Path) -> bool:
    """Whether there is no file in a folder, at any depth."""
    return path.is_dir() and not path.is_symlink() and not any(files for _, _, files in os.walk(path))


def check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Note what a run reads (prompts, weights, calibration, code, …); a continued run must read the same.

    Under `resume=force` it goes on all the same, and the record says what changed. Raises ErtaError if an input changed since
    the run began: its finished rows would not belong together.
    """
    state = read_object(folder / STATE_FILE)
    before = state.get("inputs")
    inputs = json.loads(json.dumps(inputs))
    changed = [key for key in inputs if isinstance(before, dict) and before.get(key) != inputs[key]]
    if changed and not state.get("forces"):
        raise ErtaError(
            f"{', '.join(changed)} changed since the run in {folder} began: start anew with resume=false, or go on with "
            "resume=force, which the record then says"
        )
    if changed:
        console.note(f"going on although {', '.join(changed)} changed since the run began; the record says so")
    forced = sorted({*state.get("forced", ()), *changed})
    write_json(folder / STATE_FILE, {**state, "inputs": inputs, "forced": forced})


def mark_finished(folder: Path) -> None:
    """The next run of this configuration starts anew."""
    write_json(folder / STATE_FILE, {**read_object(folder / STATE_FILE), "finished": True})


def outputs_root(fresh: Path) -> Path:
    """`outputs` for a run or a sweep below it, else the folder itself."""
    return next((parent for parent in fresh.parents if parent.name == "outputs"), fresh)


def finish(folder: Path, record: records.Record) -> None:
    """Write `record.json` and mark the run as finished."""
    write_record(folder, record)
    mark_finished(folder)


def write_record(folder: Path, record: records.Record) -> None:
    """Write `record.json`, with the inputs that changed while the run was forced on, if any did."""
    forced = read_object(folder / STATE_FILE).get("forced", [])
    write_json(folder / records.RECORD, records.to_json(replace(record, forced=forced)))
