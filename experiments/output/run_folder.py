"""The run folder: found again when unfinished, written so that nothing finished is lost."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from analysis import records
from erta.calibration import Calibration
from erta.errors import ErtaError
from erta.signature import model_signature
from experiments.prompts.choose import Prompt

STATE_FILE = "state.json"
RESULTS = (
    records.RECORD,
    records.PER_PROMPT,
    records.ROWS,
    records.SETUPS,
    records.LEFT_OUT,
    "growth.jsonl",
    "vbench.jsonl",
    "arms.jsonl",  # of earlier versions
)
NOT_HASHED = ("resume", "wandb", "sweep", "experiment", "cache.about")  # dotted; the experiment's name is
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "torchmetrics",
    "hydra-core",
    "wandb",
    "vbench",
)


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


def open_folder(cfg: DictConfig, fresh: Path, chosen: bool) -> Path:
    """The folder of an unfinished run of this configuration, or `fresh` itself, ready to write.

    Args:
        fresh: the folder that Hydra made for this run.
        chosen: it has a name (hydra.run.dir, or the experiment's own), so no other folder is looked at.

    Raises ErtaError if the folder holds another run, or cannot be written.
    """
    digest = config_hash(cfg)
    if not chosen:
        for state_path in sorted(outputs_root(fresh).glob(f"**/{STATE_FILE}"), reverse=True):
            state = read_json(state_path)
            if cfg.resume and state and state.get("config_hash") == digest and not state.get("finished"):
                return state_path.parent
        while (fresh / STATE_FILE).exists():  # two runs in one second
            fresh = fresh.with_name(f"{fresh.name}+")
    state = read_json(fresh / STATE_FILE)
    if state and state.get("config_hash") != digest:
        raise ErtaError(f"{fresh} holds another run: choose another folder with hydra.run.dir=FOLDER, or delete it")
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        anew = (state or {}).get("finished") or not cfg.resume
        if state and anew:
            for name in RESULTS:
                (fresh / name).unlink(missing_ok=True)
            shutil.rmtree(fresh / "uncached", ignore_errors=True)
            state = None
        write_json(fresh / STATE_FILE, {**(state or {}), "config_hash": digest, "finished": False})
    except OSError as error:
        raise ErtaError(
            f"cannot write to {fresh}: {error.strerror}. Choose another folder with hydra.run.dir=FOLDER."
        ) from error
    return fresh


def describe_inputs(pipe: Any, prompts: list[Prompt], calibration: Calibration | None) -> dict[str, Any]:
    """What the rows of a run depend on beyond its configuration."""
    return {
        "prompts": [[prompt.text, prompt.seed, prompt.id] for prompt in prompts],
        "weights": model_signature(pipe)["weights"],
        "calibration": calibration and [calibration.signature["weights"], calibration.record["prompts"]],
    }


def check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Note what a run reads (prompts, weights, calibration); a continued run must read the same.

    Raises ErtaError if an input changed since the run began: its finished rows would not belong together.
    """
    state = read_json(folder / STATE_FILE) or {}
    before = state.get("inputs")
    inputs = json.loads(json.dumps(inputs))
    changed = [key for key in inputs if before is not None and before.get(key) != inputs[key]]
    if changed:
        raise ErtaError(f"{', '.join(changed)} changed since the run in {folder} began: start anew with resume=false")
    write_json(folder / STATE_FILE, {**state, "inputs": inputs})


def mark_finished(folder: Path) -> None:
    """The next run of this configuration starts anew."""
    write_json(folder / STATE_FILE, {**(read_json(folder / STATE_FILE) or {}), "finished": True})


def outputs_root(fresh: Path) -> Path:
    """`outputs` for a run or a sweep below it, else the folder itself."""
    return next((parent for parent in fresh.parents if parent.name == "outputs"), fresh)


def finish(folder: Path, record: records.Record) -> None:
    """Write `record.json` and mark the run as finished."""
    write_json(folder / records.RECORD, records.to_json(record))
    mark_finished(folder)


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        partial.write_bytes(records.utf8(json.dumps(data, indent=1, ensure_ascii=False) + "\n"))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Parsed JSON, or None if the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def append_line(path: Path, data: dict[str, Any]) -> None:
    """Append one JSON line and make sure that it is on disk."""
    with open(path, "ab") as file:
        file.write(records.utf8(json.dumps(data, ensure_ascii=False) + "\n"))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; what a crash or a full disk left of the last one is cut off the file."""
    if not path.is_file():
        return []
    rows, whole = [], 0
    content = path.read_bytes()
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        whole += len(line)
    if whole < len(content):
        os.truncate(path, whole)
    return rows


def environment() -> dict[str, Any]:
    """Command, commit, versions and device of this process."""
    return {
        "command": _command(),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def describe_made(cfg: DictConfig) -> dict[str, Any]:
    """What every record begins with: command, commit, versions, device, configuration."""
    return {**environment(), "config": as_plain(cfg), "config_hash": config_hash(cfg)}


def describe_run(cfg: DictConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """The same of a run with prompts."""
    return {
        **describe_made(cfg),
        "prompts": [prompt.text for prompt in prompts],
        "seeds": [prompt.seed for prompt in prompts],
    }


def _command() -> str:
    """What was typed, without what does not decide the result: where it was written, what W&B was told."""
    typed = [part for part in sys.argv[1:] if not part.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "wandb."))]
    return " ".join(["python", Path(sys.argv[0]).name, *typed])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
