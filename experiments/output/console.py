"""What people see on the terminal."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# set for a command that another one runs: where it says how far it is, and the process that it must not outlive
PROGRESS_FILE, PARENT = "ERTA_PROGRESS_FILE", "ERTA_PARENT"
LOOK_EVERY_S = 0.5
CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF)  # what writing to an output that nobody reads any more gives
PIPED_WIDTH = 150  # columns where the output is a file or a pipe
for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:  # the command was started without
        setattr(sys, _name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def progress_bar(shown: bool = True) -> Progress:
    """The bar of everything that takes longer than five seconds; not `shown`: of what is known to be shorter."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    kind = _ReportedProgress if PROGRESS_FILE in os.environ else Progress
    return kind(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=out, disable=not shown)


class _ReportedProgress(Progress):
    """Also says how far it is in the file that `PROGRESS_FILE` names, for the command that runs this one."""

    _written_at = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._report(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._report(task_id)

    def _report(self, task_id: TaskID) -> None:
        if time.monotonic() - self._written_at < LOOK_EVERY_S:
            return
        self._written_at = time.monotonic()
        task = self.tasks[self.task_ids.index(task_id)]
        said = {"description": task.description, "completed": task.completed, "total": task.total}
        path = os.environ[PROGRESS_FILE]
        partial = f"{path}.{os.getpid()}.partial"
        with suppress(OSError):  # how far a command is is not worth the command
            with open(partial, "w", encoding="utf-8") as file:
                json.dump(said, file)
            os.replace(partial, path)


class _Output:
    """An output that may be closed: what is written then is lost, and the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._unless_closed():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unless_closed():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            with suppress(OSError, ValueError, AttributeError):  # so that nothing fails at the end of the process
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def survive_closed_output() -> None:
    """A terminal that is gone, or a pipe that nobody reads (`| head`), does not end the command."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), _Output):
            setattr(sys, name, _Output(getattr(sys, name)))


def quiet_process() -> None:
    """For a process that works for another one of the same command: it says nothing, and does not say how far it is."""
    out.quiet = True
    os.environ.pop(PROGRESS_FILE, None)


def end_with_parent() -> None:
    """If another command runs this one, end as soon as that one is gone."""
    if PARENT not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == int(os.environ[PARENT]):
            time.sleep(LOOK_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet_libraries() -> None:
    """Leave the terminal to us: no progress bars, chatter and notices of what will change from libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.raiseExceptions = False  # a log that does not fit on the disk is no traceback
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def note(text: str) -> None:
    """One line of progress."""
    out.print(text, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; the first column is left-aligned, the others are numbers."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*[str(cell) for cell in row])
    out.print(shown)
