"""What people see on the terminal."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PIPED_WIDTH = 150  # columns where the output is a file or a pipe
out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def progress_bar() -> Progress:
    """The bar of everything that takes longer than five seconds."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=out)


def quiet_libraries() -> None:
    """Leave the terminal to us: no progress bars, chatter and notices of what will change from libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning)
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
