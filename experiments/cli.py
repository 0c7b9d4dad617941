"""The command line: composes the configuration, opens the run folder, turns errors into one or two lines."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from erta.errors import ErtaError
from experiments.harness import config
from experiments.harness.config import CONF
from experiments.output import console, sweep
from experiments.output.sweep import Member

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
TRACEBACK = "--traceback"


def main() -> None:
    """Entry point of run.py."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through whole, and `_short_errors` shortens them
    if TRACEBACK in sys.argv:
        sys.argv.remove(TRACEBACK)
        os.environ[TRACEBACK] = "1"
    console.end_with_parent()
    with _short_errors(), sweep.shown_at_its_end():
        _hydra_main()


@contextmanager
def _short_errors() -> Iterator[None]:
    """Turn an error into one or two lines and an exit code, unless a traceback was asked for."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted. What was finished is kept: the same command goes on from there.", EXIT_INTERRUPTED)
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        _fail(f"error: {_explain(error)}", EXIT_ERROR)


config.register()


@hydra.main(version_base=None, config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _run_member(cfg)
    with _short_errors():
        _run(cfg)
    return None


def _run_member(cfg: DictConfig) -> float | None:
    """A run of a sweep, which goes on with its others if this one fails: the sweep's end says so."""
    member = Member(HydraConfig.get())
    try:
        member.note("started")
        folder = _run(cfg, member)
        value = sweep.objective(cfg, folder)
        member.note("finished")
        return value
    except Exception as error:
        reason = _explain(error)
        member.note("failed", " ".join(reason.split()))
        if TRACEBACK in os.environ:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return None


def _run(cfg: DictConfig, member: Member | None = None) -> Path:
    """Run the experiment in its folder, unless the sweep that it belongs to holds it already, finished."""
    from experiments.output import tracking

    overrides = list(HydraConfig.get().overrides.task)
    for override in overrides:
        if override.startswith("+"):
            raise ErtaError(f"{override}: keys cannot be added; python run.py --cfg job shows those that exist")
    config.check_is_read(cfg, overrides)
    config.validate(cfg)
    tracking.check(cfg)
    console.quiet_libraries()
    from experiments.models.load import memory_advice
    from experiments.output.run_folder import STATE_FILE, open_folder

    fresh, is_finished = Path(HydraConfig.get().runtime.output_dir), False
    if member is None:
        named = any(override.startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra)
        chosen = named or cfg.experiment.keeps_folder
        folder = open_folder(cfg, fresh, chosen)
    else:
        folder, is_finished = member.open(cfg)
        console.note(f"{'kept, as it is finished' if is_finished else 'run'}: {' '.join(overrides)} ({folder.name})")
    if folder != fresh and not (fresh / STATE_FILE).exists():  # Hydra's copy of the same configuration
        shutil.rmtree(fresh / ".hydra", ignore_errors=True)
        with suppress(OSError):
            fresh.rmdir()
    if not is_finished:
        with memory_advice(cfg):
            get_method(cfg.experiment._target_)(cfg, folder)
    return folder


def _explain(error: BaseException) -> str:
    if isinstance(error, ErtaError):
        return str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: no such file or folder"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        reason = f": {_first_lines(error.__cause__, 1)}" if error.__cause__ is not None else ""
        return _unknown_key(str(error)) or _unknown_choice(str(error)) or _first_lines(error, 2) + reason
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}). Free some space; the same command goes on."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {error.filename}: {error.strerror}. Choose another folder with hydra.run.dir=FOLDER."
    return f"{type(error).__name__}: {_first_lines(error, 1)} (add --traceback for where this came from)"


def _unknown_key(message: str) -> str | None:
    """Hydra's error for a key that does not exist, with the nearest one that does instead of its `+` advice."""
    found = re.match(r"Could not override '([^']+)'", message)
    if found is None:
        return None
    if found[1] in config.all_keys():  # of an experiment that is not the one that is run
        return f"{found[1]} is read by experiment={found[1].split('.')[0]} only: leave it out, or add that"
    chosen = next((word.partition("=")[2] for word in sys.argv if word.startswith("experiment=")), "main")
    own = f"{chosen}.{found[1].split('.')[-1]}"
    nearest = [own] if own in config.all_keys() else difflib.get_close_matches(found[1], config.all_keys(), n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "python run.py --cfg job shows those that exist"
    return f"unknown key {found[1]}: {hint}"


def _unknown_choice(message: str) -> str | None:
    """Hydra's error for a group without such a file, with those that exist."""
    if re.search(r"Could not (load|find) '(hydra/sweeper/)?optuna", message):
        return "this sweeper needs hydra-optuna-sweeper, an extra: pip install -e '.[sweeps]'"
    found = re.search(r"Could not find '(\w+)/([^']+)'", message)
    if found is None or found[1] == "hydra" or not (CONF / found[1]).is_dir():
        return None
    choices = ", ".join(path.stem for path in sorted((CONF / found[1]).glob("*.yaml")))
    return f"there is no {found[1]}={found[2]}. Choose from {choices}"


def _first_lines(error: BaseException, count: int) -> str:
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(lines[:count])


def _fail(message: str, code: int) -> None:
    console.out.print()
    print(message, file=sys.stderr)
    raise SystemExit(code)
