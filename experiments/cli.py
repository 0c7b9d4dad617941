"""The command line: composes the configuration, opens the run folder, turns errors into one or two lines."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from experiments.output import console, ranks, sweep
from experiments.output.files import full_disk
from experiments.output.sweep import Member

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
TRACEBACK = "--traceback"


def main() -> None:
    """Entry point of run.py."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through whole, and `_short_errors` shortens them
    if TRACEBACK in sys.argv:
        sys.argv.remove(TRACEBACK)
        os.environ[TRACEBACK] = "1"
    console.survive_closed_output()
    console.end_with_parent()
    with _short_errors(), sweep.shown_at_its_end():
        _check_folders_named(sys.argv[1:])
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
        if isinstance(error, ranks.FailedElsewhere):
            raise SystemExit(EXIT_ERROR) from None
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


def _check_folders_named(arguments: list[str]) -> None:
    """Raise ErtaError for a folder without a name, before Hydra writes into the working folder instead."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and not value.strip("'\" "):
            raise ErtaError(f"{key}= names no folder: {key}=FOLDER, or leave it out")


def _run(cfg: DictConfig, member: Member | None = None) -> Path:
    """Run the experiment in its folder, unless the sweep that it belongs to holds it already, finished."""
    from experiments.output.run_folder import tidy

    fresh = Path(HydraConfig.get().runtime.output_dir)
    try:
        _check(cfg, list(HydraConfig.get().overrides.task))
        from experiments.models.load import memory_advice

        with ranks.together(), _opened(cfg, fresh, member) as (folder, is_finished):
            if folder != fresh:  # Hydra's copy of the same configuration
                tidy(fresh)
            if not is_finished:
                with memory_advice(cfg):
                    get_method(cfg.experiment._target_)(cfg, folder)
    except BaseException:
        tidy(fresh)
        raise
    return folder


def _check(cfg: DictConfig, overrides: list[str]) -> None:
    """Before anything is loaded. Raises ErtaError."""
    from experiments.output import tracking

    for override in overrides:
        if override.startswith("+"):
            raise ErtaError(f"{override}: keys cannot be added; python run.py --cfg job shows those that exist")
    config.check_is_read(cfg, overrides)
    config.validate(cfg)
    if ranks.count() > 1 and (HydraConfig.get().mode == RunMode.MULTIRUN or not cfg.experiment.ranks):
        what = "a sweep" if HydraConfig.get().mode == RunMode.MULTIRUN else f"experiment={cfg.experiment.name}"
        raise ErtaError(f"{what} does not share its work over ranks: start it without torchrun, as python run.py …")
    tracking.check(cfg)
    console.quiet_libraries()


@contextmanager
def _opened(cfg: DictConfig, fresh: Path, member: Member | None) -> Iterator[tuple[Path, bool]]:
    """The run's folder, and whether the run is finished there."""
    from experiments.output.run_folder import open_folder

    overrides = HydraConfig.get().overrides
    if member is None:
        named = any(override.startswith("hydra.run.dir=") for override in overrides.hydra)
        with ExitStack() as held:  # the first rank's, for all of them
            opened = open_folder(cfg, fresh, named or cfg.experiment.keeps_folder)
            yield ranks.same(lambda: held.enter_context(opened)), False
        return
    with member.open(cfg) as (folder, is_finished):
        done = "kept, as it is finished" if is_finished else "run"
        console.note(f"{done}: {' '.join(overrides.task)} ({folder.name})")
        yield folder, is_finished


def _explain(error: BaseException) -> str:
    if (full := full_disk(error)) is not None:
        return f"the disk is full ({full or 'while writing'}). Free some space; the same command goes on."
    if isinstance(error, ErtaError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        if "RayLauncher" in str(error):
            return "this launcher needs hydra-ray-launcher, in an environment of its own: see experiments/CLUSTER.md"
        reason = f": {_first_lines(error.__cause__, 1)}" if error.__cause__ is not None else ""
        return _unknown_key(str(error)) or _unknown_choice(str(error)) or _first_lines(error, 2) + reason
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {error.filename}: {error.strerror}. Choose another folder with hydra.run.dir=FOLDER."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
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
    if re.search(r"Could not (load|find) '(hydra/launcher/)?submitit", message):
        return "this launcher needs hydra-submitit-launcher, an extra: pip install -e '.[slurm]'"
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
