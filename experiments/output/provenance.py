"""What a record says of its making: command, commit, versions, device, inputs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from erta.calibration import Calibration
from erta.pipeline import find_denoiser
from erta.signature import model_signature, weights_digest
from experiments.output.run_folder import as_plain, config_hash
from experiments.prompts.choose import Prompt

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = ("erta", "experiments")
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


def describe_inputs(pipe: Any, prompts: list[Prompt], calibration: Calibration | None) -> dict[str, Any]:
    """What the rows of a run depend on beyond its configuration: code, versions and device among it."""
    return {
        "prompts": [[prompt.text, prompt.seed, prompt.id] for prompt in prompts],
        "weights": model_signature(pipe)["weights"],
        "parts": {
            name: weights_digest(part)
            for name, part in sorted(pipe.components.items())
            if isinstance(part, torch.nn.Module) and any(True for _ in part.parameters())
        },
        "calibration": calibration
        and [calibration.signature["weights"], calibration.record["prompts"], calibration.digest()],
        "source": source_digest(*SOURCES, without=("experiments/training",)),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "dtype": str(find_denoiser(pipe).dtype),
    }


def source_digest(*folders: str, without: Sequence[str] = ()) -> str:
    """Digest of every Python file of these folders of the project."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (PROJECT / folder).rglob("*.py")):
        name = path.relative_to(PROJECT).as_posix()
        if not name.startswith(tuple(without) or "/"):
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


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
    typed = [
        part
        for part in sys.argv[1:]
        if not part.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "wandb.", "resume=", "wait="))
    ]
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
