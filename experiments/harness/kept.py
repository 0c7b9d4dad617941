"""What a method searched for or measured on calibration prompts is kept for the next run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from omegaconf import DictConfig

from experiments.harness.calibrations import MADE_HERE, expected_signature, prompts_for
from experiments.output.run_folder import read_json, write_json

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


def kept(cfg: DictConfig, pipe: Any, name: str, setup: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`make()`, or what an earlier run made for the same model, grid, guidance, size, calibration prompts and `setup`."""
    size = [cfg.model.height, cfg.model.width, cfg.model.num_frames, cfg.model.max_sequence_length]
    made_for = [expected_signature(cfg, pipe), size, prompts_for(cfg, pipe), setup, COUNTED]
    digest = hashlib.sha256(json.dumps(made_for).encode()).hexdigest()[:10]
    path = MADE_HERE / f"{cfg.model.name}-{name}-{digest}.json"
    found: dict[str, Any] | None = read_json(path)
    if found is None or "made" not in found:
        started = time.perf_counter()
        made = make()
        found = {"seconds": time.perf_counter() - started, "made": made}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    if (spent := _SPENT.get()) is not None:
        spent[path.name] = found["seconds"]
    return found["made"]
