"""What a method searched for or measured on calibration prompts is kept for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from experiments.harness.calibrations import kept_path, locked
from experiments.harness.setup import Setup
from experiments.output import ranks
from experiments.output.files import read_object, write_json

COUNTED = 2  # raised when forwards are counted, or modules chosen, in another way: what was kept before is made anew
_SPENT: ContextVar[dict[str, float] | None] = ContextVar("seconds of what is kept", default=None)


@contextmanager
def search_seconds() -> Iterator[dict[str, float]]:
    """By name, the seconds that everything took which `kept` gives inside the `with`, also if an earlier run made it."""
    spent: dict[str, float] = {}
    token = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(token)


def kept(
    setup: Setup, name: str, made_with: list[Any], make: Callable[[], dict[str, Any]], before: Iterable[list[Any]] = ()
) -> dict[str, Any]:
    """`make()`, or what an earlier run made for the same model, grid, guidance, size, calibration prompts and `made_with`.

    Args:
        before: what `made_with` was in earlier versions, whose files are still read.
    """
    names = [f"{setup.cfg.model.name}-{name}-{_digest(setup, one)}.json" for one in (made_with, *before)]
    paths = [kept_path(one) for one in names]
    path = next((path for path in paths if path.is_file()), paths[0])
    found = _read(path)
    if found is None:
        with ranks.alone(), locked(path):  # another process may have made it meanwhile
            found = _read(path)
            if found is None:
                started = time.perf_counter()
                made = make()
                found = {"seconds": time.perf_counter() - started, "made": made}
                write_json(path, found)
    note_spent(path.name, found["seconds"])
    return found["made"]


def _read(path: Path) -> dict[str, Any] | None:
    """What is kept; None if it is absent or damaged."""
    found = read_object(path)
    is_whole = isinstance(found.get("made"), dict) and isinstance(found.get("seconds"), (int, float))
    return found if is_whole else None


def note_spent(name: str, seconds: float) -> None:
    """Count seconds, once under each name, for whoever asks with `search_seconds`."""
    if (spent := _SPENT.get()) is not None:
        spent[name] = seconds


def _digest(setup: Setup, made_with: list[Any]) -> str:
    model = setup.cfg.model
    size = [*setup.size, model.max_sequence_length]
    made_for = [setup.signature, size, setup.calibration_prompts, made_with, COUNTED]
    return hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:10]
