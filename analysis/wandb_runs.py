"""W&B runs of ours, from the files that they leave behind or from the server.

A `.wandb` file is a log of protobuf records in LevelDB's blocks. It is read up to its first damaged record, so of a run that was
killed all that reached the disk is there. Runs online are read by `wandb.Api`.
"""

from __future__ import annotations

import json
import os
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from analysis.records import RecordError

API = "wandb:"  # before entity/project, names a source online
FRAME = "frame"  # key of the summary under which a run keeps its rows of `analysis.runs`
ACCESS_S = 8.0  # within which the server must have answered
LOOK_S = 4.0
BLOCK, HEADER, FIRST = 32768, struct.Struct("<IHB"), struct.Struct("<4sHB")
IDENT, MAGIC = b":W&B", 0xBEE1
FULL, FIRST_PART, MIDDLE_PART, LAST_PART = 1, 2, 3, 4


@dataclass(frozen=True)
class WandbRun:
    """One run: what it was told at its start, what it logged, what it came to.

    Attributes:
        state: `finished`, `failed`, or `unfinished` for one that was killed or still runs.
        history: what was logged, by step.
        folder: the run folder in which its files lie; None for one that was read online.
    """

    id: str
    name: str
    state: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    folder: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether its configuration is one of `run.py`."""
        return all(isinstance(self.config.get(key), dict) for key in ("experiment", "model", "cache"))


def find_files(root: Path) -> list[Path]:
    """All `.wandb` files below a folder, each once: `latest-run` points to another."""
    return sorted({path.resolve() for path in root.glob("**/run-*.wandb")})


def read_files(paths: list[Path], tell: Callable[[str], None]) -> list[WandbRun]:
    """One run an id: several files of one id are one run that went on, and what is later in them counts.

    Args:
        tell: is given a line for every file that cannot be read, or not to its end.
    """
    parts: dict[str, list[tuple[float, WandbRun]]] = {}
    for path in paths:
        try:
            started, run = _read_file(path, tell)
        except RecordError as error:
            tell(f"passed over: {error}")
            continue
        parts.setdefault(run.id, []).append((started, run))
    return [_joined([run for _, run in sorted(found, key=lambda part: part[0])]) for found in parts.values()]


def _joined(parts: list[WandbRun]) -> WandbRun:
    last = parts[-1]
    steps = {line["_step"]: line for part in parts for line in part.history}
    summary = {key: value for part in parts for key, value in part.summary.items()}
    return WandbRun(
        last.id, last.name, last.state, last.config, summary, [steps[step] for step in sorted(steps)], last.folder
    )


def _read_file(path: Path, tell: Callable[[str], None]) -> tuple[float, WandbRun]:
    """When it began, in seconds, and the run of one file. Raises RecordError where not even its beginning is whole."""
    from wandb.proto import wandb_internal_pb2 as proto

    started, about, state = 0.0, None, "unfinished"
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for content in _contents(path, tell):
        record = proto.Record()
        try:
            record.ParseFromString(content)
        except Exception as error:  # protobuf's, of which there are several
            raise RecordError(f"{path} is no W&B file that this version of wandb can read: {error}") from error
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about, started = record.run, record.run.start_time.ToNanoseconds() / 1e9
            _update(config, record.run.config.update)
        elif kind == "config":
            _update(config, record.config.update)
        elif kind == "summary":
            _update(summary, record.summary.update)
        elif kind == "history":
            line: dict[str, Any] = {}
            _update(line, record.history.item)
            history.append({"_step": record.history.step.num, **line})
        elif kind == "exit":
            state = "failed" if record.exit.exit_code else "finished"
    if about is None:
        raise RecordError(f"{path} ends before it says which run it is of")
    config.pop("_wandb", None)
    inside = path.parents[1].name == "wandb"
    folder = path.parents[2] if inside else path.parent
    return started, WandbRun(about.run_id, about.display_name, state, config, summary, history, _shown(folder))


def _shown(folder: Path) -> str:
    """Relative to where we are, if it lies below."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _update(data: dict[str, Any], items: Any) -> None:
    """Take over key by key, `nested_key` level by level."""
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        place = data
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)


def _contents(path: Path, tell: Callable[[str], None]) -> Iterator[bytes]:
    """The records of a file, as bytes, up to the first that is damaged or cut off."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) < FIRST.size or FIRST.unpack_from(data)[:2] != (IDENT, MAGIC):
        raise RecordError(f"{path} is not a W&B file, or was cut off at its beginning")
    place, parts = FIRST.size, []
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:  # filled with zeros
            place += left
            continue
        if place + HEADER.size > len(data):
            break
        checksum, size, kind = HEADER.unpack_from(data, place)
        part = data[place + HEADER.size : place + HEADER.size + size]
        if len(part) < size or kind not in (FULL, FIRST_PART, MIDDLE_PART, LAST_PART):
            break
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            break
        parts.append(part)
        place += HEADER.size + size
        if kind in (FULL, LAST_PART):
            yield b"".join(parts)
            parts = []
    if place < len(data) or parts:
        tell(f"{path} ends in the middle of a record: what is whole before it is read")


def read_api(path: str, api: Any = None) -> list[WandbRun]:
    """The runs of `entity/project` on the W&B server, the oldest first.

    Args:
        api: a `wandb.Api`; None: one is made.

    Raises RecordError for another path, without a key or an answer, and for a project that does not exist.
    """
    if len([part for part in path.split("/") if part]) != 2:
        raise RecordError(f"{API}{path}: give the entity and the project, {API}ENTITY/PROJECT")
    if api is None:
        check_access()
        import wandb

        api = wandb.Api()
    try:
        return [_from_api(run) for run in api.runs(path, order="+created_at")]
    except Exception as error:  # the library's and requests' own, of many kinds
        raise RecordError(f"{API}{path} cannot be read: {_first_line(error)}") from error


def _from_api(run: Any) -> WandbRun:
    summary = dict(run.summary_metrics)
    state = run.state if run.state in ("finished", "failed") else "unfinished"
    history = [] if FRAME in summary else [dict(line) for line in run.scan_history()]
    return WandbRun(run.id, run.name or run.id, state, dict(run.config), summary, history)


def check_access() -> None:
    """Raise RecordError if W&B cannot be used online: no key, a refused one, or no answer within `ACCESS_S` seconds."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        known = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key that is none
        raise RecordError(f"W&B refuses the key: {_first_line(error)}") from error
    if not known:
        raise RecordError("W&B online needs a key: `wandb login`, or set WANDB_API_KEY")
    url = wandb.setup().settings.base_url

    def answers() -> None:
        _look(url)
        wandb.login(prompt=False, verify=True)

    try:
        _within(ACCESS_S, answers)
    except TimeoutError as error:
        raise RecordError(f"the W&B server {url} did not answer in time") from error
    except Exception as error:
        raise RecordError(f"the W&B server cannot be used: {_first_line(error)}") from error


def _look(url: str) -> None:
    """Raise OSError if nobody answers at all; any answer will do."""
    try:
        urlopen(Request(url, method="HEAD"), timeout=LOOK_S).close()
    except HTTPError:
        return
    except URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # wandb has certificates of its own
            raise OSError(f"{url} does not answer: {error.reason}") from error


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Raise what `call` raises, or TimeoutError; one that takes longer is left alone."""
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            call()
            ended.append(None)
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError
    if ended[0] is not None:
        raise ended[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
