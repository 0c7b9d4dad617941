"""Weights & Biases: every experiment has a tracker, offline unless asked otherwise.

A run folder is one W&B run, whose id is kept in `state.json`. A run that goes on logs its finished samples again under the same
steps: offline it leaves a second file, which is then whole by itself, and online what the server has is left out. Whatever W&B
does, the experiment goes on: the first failure is told, and nothing more is sent. A full disk is not W&B's: it ends the run as it
does anywhere else, unless the record is there already.
"""

from __future__ import annotations

import errno
import numbers
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from PIL import Image, ImageSequence

from analysis import run_rows
from analysis.records import RecordError
from analysis.wandb_runs import FRAME, check_access
from erta.errors import ErtaError
from experiments.output import console
from experiments.output.files import full_disk, read_object, write_json
from experiments.output.run_folder import STATE_FILE, as_plain

SHOWN_PAIRS = 4  # of clips, as media
KEPT = ("record.json", "plan.json", "per_prompt.jsonl", "rows.jsonl", "setups.jsonl", "growth.jsonl", "table.md")
INIT_S = {"online": 10.0, "offline": 60.0}
FINISH_S = 60.0  # what is not sent by then lies in the files, from where `wandb sync` sends it
GAP_PX = 4
OFFLINE = "wandb.mode=offline needs neither key nor network, and `wandb sync` sends its files later"


class Tracker:
    """Sends what a run is about to W&B, or nowhere. A failure of W&B raises nothing and costs no sample."""

    def __init__(self, run: Any, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._step = 0  # of the next point

    def log(self, sample: Mapping[str, Any], row: str | None = None) -> None:
        """A point: one sample's numbers, under the key of its row if it is of a table. Texts and lists are left out."""
        known = scalars(sample)
        self._point(known if row is None else {f"{row}/{key}": value for key, value in known.items()})

    def media(self, name: str, sides: Mapping[str, Path], caption: str = "") -> None:
        """Pictures or clips of the same size next to each other, as one picture or one clip; nothing if one is missing.

        Args:
            sides: files that Pillow reads (WebP, PNG, GIF) by what they are, from left to right.
        """
        if not all(path.is_file() for path in sides.values()):
            return

        def make(wandb: Any) -> dict[str, Any]:
            frames, duration_ms = side_by_side(list(sides.values()))
            said = ", ".join([*sides]) + (f": {caption}" if caption else "")
            if len(frames) == 1:
                return {name: wandb.Image(frames[0], caption=said)}
            file = BytesIO()
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=duration_ms, loop=0)
            file.seek(0)
            return {name: wandb.Video(file, caption=said, format="gif")}

        self._made(make)

    def figures(self, folder: Path) -> None:
        """Every PNG of a folder."""
        paths = sorted(folder.glob("*.png"))
        if paths:
            self._made(lambda wandb: {f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; a cell may be None."""
        lines = [[_plain(cell) for cell in row] for row in rows]
        if lines:
            self._made(lambda wandb: {name: wandb.Table(columns=list(columns), data=lines, allow_mixed_types=True)})

    def finish(self, summary: Mapping[str, Any] | None = None, files: Iterable[Path] = ()) -> None:
        """What the run comes to, after its record was written.

        The rows that `analysis.runs` shows of the folder go into the summary. Record, plan and samples' numbers, and `files`, are
        kept as one artifact.
        """
        rows: list[dict[str, Any]] = []

        def read(_: Any) -> None:
            with suppress(RecordError):  # an experiment without a record
                rows.extend(run_rows.folder_rows(self._folder))

        self._try(read)
        if len(rows) > 1:
            columns = list({key: None for row in rows for key in row})
            self.table("rows", columns, [[row.get(key) for key in columns] for row in rows])
        self._try(lambda run: run.summary.update({**(summary or {}), FRAME: rows}))
        paths = [path for path in [*(self._folder / name for name in KEPT), *files] if path.is_file()]
        if paths:
            self._try(lambda run: self._keep(run, paths))

    def _keep(self, run: Any, paths: list[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{run.job_type}-{run.id}", type="run-record")
        for path in paths:
            artifact.add_file(str(path.resolve()), name=path.name, policy="immutable")
        run.log_artifact(artifact)

    def _made(self, make: Callable[[Any], dict[str, Any]]) -> None:
        """A point of what has to be made first."""
        made: dict[str, Any] = {}

        def fill(_: Any) -> None:
            import wandb

            made.update(make(wandb))

        self._try(fill)
        self._point(made)

    def _point(self, data: dict[str, Any]) -> None:
        step, self._step = self._step, self._step + 1

        def send(run: Any) -> None:
            if step >= run.step:  # a run that goes on online has the others
                run.log(data, step=step, commit=True)

        self._try(send)

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever it is, a sample is worth more
            _leave_if_full(error, self._folder)
            first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            reason = first if full_disk(error) is None else "the disk is full"
            console.note(f"W&B stopped ({reason}): this run goes on without it and keeps its record")
            _close(self._run, failed=True)
            self._run = None

    def close(self, failed: bool) -> None:
        """The end of the run, as W&B is told."""
        if self._run is not None:
            _close(self._run, failed)
            self._run = None


def check(cfg: DictConfig) -> None:
    """Before anything is loaded: raise ErtaError if `wandb.mode=online` cannot work, within 10 seconds."""
    if cfg.wandb.mode == "online":
        _import()
        try:
            check_access()
        except RecordError as error:
            raise ErtaError(f"{error}.\n{OFFLINE}") from error


@contextmanager
def start(cfg: DictConfig, folder: Path) -> Iterator[Tracker]:
    """A tracker of one run, its files in `folder`/wandb. Raises ErtaError if a run online does not start."""
    if cfg.wandb.mode == "disabled" or int(os.environ.get("RANK", 0)):  # the first rank speaks for all
        yield Tracker(None, folder)
        return
    with _surroundings(folder):
        tracker = Tracker(_begin(cfg, folder), folder)
        try:
            yield tracker
        except BaseException:
            tracker.close(failed=True)
            raise
        tracker.close(failed=False)


def _import() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ErtaError("wandb is not installed: `pip install erta[run]`, or set wandb.mode=disabled") from error
    return wandb


def _begin(cfg: DictConfig, folder: Path) -> Any:
    """The run, new or going on; None if it does not start offline."""
    wandb = _import()
    state = read_object(folder / STATE_FILE)
    run_id = state.get("wandb_id") or secrets.token_hex(4)
    online = cfg.wandb.mode == "online"
    try:
        run = wandb.init(
            project=cfg.wandb.project,
            id=run_id,
            resume="allow" if online else None,  # offline nobody knows what there is
            name=folder.name,
            group=_group(cfg),
            job_type=cfg.experiment.name,
            dir=str(folder),
            mode=cfg.wandb.mode,
            config=as_plain(cfg),
            settings=wandb.Settings(
                disable_git=True,
                save_code=False,
                console="off",
                init_timeout=INIT_S[cfg.wandb.mode],
                finish_timeout=FINISH_S,
            ),
        )
    except Exception as error:
        _leave_if_full(error, folder)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if online:
            raise ErtaError(f"W&B did not start: {first}.\n{OFFLINE}") from error
        console.note(f"W&B did not start ({first}): this run goes on without it and keeps its record")
        return None
    write_json(folder / STATE_FILE, {**state, "wandb_id": run_id})
    return run


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """A silent W&B that keeps what it has to send beside the run, not in the home folder."""
    wanted = {
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DATA_DIR": str((folder / "wandb" / "data").resolve()),
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update({key: before[key] or value for key, value in wanted.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


def _group(cfg: DictConfig) -> str:
    """Runs of an experiment are a group, and those of a sweep are one of their own."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = Path(HydraConfig.get().sweep.dir)
        return f"{cfg.experiment.name}, {'/'.join(sweep.parts[-2:])}"
    return str(cfg.experiment.name)


def _leave_if_full(error: Exception, folder: Path) -> None:
    """Raise OSError for a full disk, as long as the run in this folder has not finished."""
    full = full_disk(error)
    if full is not None and not read_object(folder / STATE_FILE).get("finished"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), full or str(folder / "wandb")) from error


def _close(run: Any, failed: bool) -> None:
    """End a run; a service that is dead is forgotten, so that the next run starts another."""
    try:
        run.finish(exit_code=int(failed))
    except Exception:
        import wandb

        with suppress(Exception):
            wandb.teardown()


def scalars(sample: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers and truth values of a sample, those inside under `outer/inner`; of a scene, whether all of it is right."""
    found: dict[str, Any] = {}
    for key, value in sample.items():
        if key == "scene" and isinstance(value, Mapping):
            value = value.get("all")
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (numbers.Real, np.bool_)):
            found[f"{prefix}{key}"] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's own, NaN as nothing."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def side_by_side(paths: Sequence[Path]) -> tuple[list[Image.Image], int]:
    """Frames of several clips in one, and how long each is shown, in ms."""
    clips, duration_ms = [], 125
    for path in paths:
        with Image.open(path) as image:
            clips.append([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
            duration_ms = image.info.get("duration") or duration_ms
    frames = []
    for together in zip(*clips, strict=True):
        gap = np.full((together[0].shape[0], GAP_PX, 3), 255, np.uint8)
        spaced = [part for side in together for part in (side, gap)][:-1]
        frames.append(Image.fromarray(np.concatenate(spaced, axis=1)))
    return frames, duration_ms
