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


class Tracker:
    """Sends rows and the final metrics to a W&B run, or nowhere."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, row: dict[str, Any]) -> None:
        """One prompt's numbers."""
        if self._run is not None:
            self._run.log(
                {key: row[key] for key in ("psnr_db", "ssim", "ms_ssim", "lpips") if row.get(key) is not None}
            )

    def finish(self, record: dict[str, Any]) -> None:
        """The run's metrics as its summary."""
        if self._run is not None:
            self._run.summary.update({**record["metrics"], "timing": record["timing"], "memory": record["memory"]})


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
