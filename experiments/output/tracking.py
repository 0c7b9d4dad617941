"""Weights & Biases, offline unless asked otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.output.run_folder import as_plain

LOGGED = ("psnr_db", "ssim", "ms_ssim", "lpips", "forwards")


class Tracker:
    """Sends rows and the final metrics to a W&B run, or nowhere."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, sample: dict[str, Any], row: str | None = None) -> None:
        """One sample's numbers, under the key of its row if it is of a table."""
        if self._run is not None:
            known = {key: sample[key] for key in LOGGED if sample.get(key) is not None}
            self._run.log(known if row is None else {f"{row}/{key}": value for key, value in known.items()})

    def finish(self, summary: dict[str, Any]) -> None:
        """What the run comes to."""
        if self._run is not None:
            self._run.summary.update(summary)


@contextmanager
def start(cfg: DictConfig, folder: Path) -> Iterator[Tracker]:
    """A tracker for one run, its files in `folder`."""
    if cfg.wandb.mode == "disabled":
        yield Tracker(None)
        return
    try:
        import wandb
    except ImportError as error:
        raise ErtaError("wandb is not installed: `pip install erta[run]`, or set wandb.mode=disabled") from error
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    run = wandb.init(
        project=cfg.wandb.project,
        name=folder.name,
        dir=str(folder),
        mode=cfg.wandb.mode,
        config=as_plain(cfg),
        settings=wandb.Settings(disable_git=True, save_code=False, console="off"),
    )
    try:
        yield Tracker(run)
    finally:
        run.finish()
