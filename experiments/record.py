"""The run folder: found again when unfinished, written so that nothing finished is lost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.config import as_plain

SCHEMA = "erta.record/1"
STATE_FILE = "state.json"
NOT_HASHED = ("resume", "wandb")
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


def config_hash(cfg: DictConfig) -> str:
    """Digest of everything in the configuration that decides the result."""
    plain = {key: value for key, value in as_plain(cfg).items() if key not in NOT_HASHED}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def open_folder(cfg: DictConfig, fresh: Path) -> Path:
    """The folder of an unfinished run of this configuration beside `fresh`, or `fresh` itself, ready to write."""
    digest = config_hash(cfg)
    if cfg.resume:
        for state_path in sorted(fresh.parent.parent.glob(f"*/*/{STATE_FILE}"), reverse=True):
            state = read_json(state_path)
            if state and state.get("config_hash") == digest and not state.get("finished"):
                return state_path.parent
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        write_json(fresh / STATE_FILE, {"config_hash": digest, "finished": False})
    except OSError as error:
        raise ErtaError(
            f"cannot write to {fresh}: {error.strerror}. Choose another folder with hydra.run.dir=FOLDER."
        ) from error
    return fresh


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Write `record.json` and mark the run as finished."""
    write_json(folder / "record.json", record)
    write_json(folder / STATE_FILE, {"config_hash": record["config_hash"], "finished": True})


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Parsed JSON, or None if the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def append_line(path: Path, data: dict[str, Any]) -> None:
    """Append one JSON line and make sure that it is on disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(data, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file; a line cut short by a crash is dropped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def environment() -> dict[str, Any]:
    """Command, commit, versions and device of this process."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "git_commit": _git_commit(),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
