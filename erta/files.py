"""How the library writes files: whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` at the end of the `with`: a reader sees the old file or the whole new one.

    Raises OSError for a full disk, also where a library wraps it in an error of its own (safetensors does).
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        yield partial
        partial.replace(path)
    except Exception as error:
        if not isinstance(error, OSError) and re.search(r"No space left on device|os error 28\b", str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], schema: str, **metadata: Any) -> None:
    """Write arrays, and what is said about them as JSON metadata, as one safetensors file (`erta.loading.arrays_of`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"schema": schema, **{name: json.dumps(value) for name, value in metadata.items()}}
    with replacing(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, said)
