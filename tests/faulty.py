"""run.py on a machine whose disk is full from some write on: `python -m tests.faulty WRITES arguments…`."""

from __future__ import annotations

import builtins
import errno
import os
import sys
from pathlib import Path
from typing import Any


def fill_after(writes: int, under: Path) -> None:
    """From the n-th file that is opened for writing below `under` on, every write there fails as on a full disk."""
    count, plain = [0], builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        is_written = any(letter in mode for letter in "wax+")
        if is_written and not isinstance(file, int) and Path(os.fspath(file)).absolute().is_relative_to(under):
            count[0] += 1
            if count[0] > writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(file))
        return plain(file, mode, *args, **options)

    builtins.open = opened
    import io

    io.open = opened  # type: ignore[assignment]


if __name__ == "__main__":
    fill_after(int(sys.argv.pop(1)), Path.cwd())
    from experiments.cli import main

    sys.argv[0] = "run.py"
    main()
