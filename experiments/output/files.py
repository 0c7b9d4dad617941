"""JSON on disk: files that are whole or absent, and lines of which a power cut loses the last one at most."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis import records
from experiments.output import console


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, after a power cut too."""
    write_whole(path, records.utf8(json.dumps(data, indent=1, ensure_ascii=False) + "\n"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, after a power cut too."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name(error, path)
        raise
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Parsed JSON, or None if the file is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is absent, damaged or something else."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def append_line(path: Path, data: dict[str, Any]) -> None:
    """Append one JSON line and make sure that it is on disk; a line that does not fit there is not left half written."""
    is_new = not path.exists()
    with open(path, "ab") as file:
        end = file.tell()
        try:
            file.write(records.utf8(json.dumps(data, ensure_ascii=False) + "\n"))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, end)
            _name(error, path)
            raise
    if is_new:
        _sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSONL file. What a crash or a full disk left of the last one is cut off the file; a damaged line
    before it is taken out, and those after it stay.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    whole: list[bytes] = []
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for line in lines:
        row = _row(line)
        if row is not None:
            rows.append(row)
            whole.append(line)
    if len(whole) < len(lines):
        if lines[: len(whole)] == whole and len(lines) == len(whole) + 1:  # only the end: others may have the file open
            os.truncate(path, sum(map(len, whole)))
        else:
            console.note(f"{path}: {len(lines) - len(whole)} damaged lines are taken out, and made anew")
            write_whole(path, b"".join(whole))
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_own_lines(path: Path, key_of: Callable[[dict[str, Any]], Hashable | None]) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are this run's, each once.

    Args:
        key_of: what names a line; None for one that is not this run's.

    Foreign lines are taken out of the file. So are lines that stand there twice, all of them: which is right is not known, and
    what is missing is made anew.
    """
    lines = read_lines(path)
    keys = [key_of(line) for line in lines]
    counts = Counter(keys)
    own = [line for line, key in zip(lines, keys, strict=True) if key is not None and counts[key] == 1]
    if len(own) < len(lines):
        console.note(f"{path}: {len(lines) - len(own)} lines are foreign, or twice there: they are made anew")
        write_lines(path, own)
    return own


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A whole JSONL file at once."""
    write_whole(path, b"".join(records.utf8(json.dumps(line, ensure_ascii=False) + "\n") for line in lines))


def _name(error: BaseException, path: Path) -> None:
    """Say of an error of writing which file it was, where it does not by itself."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _sync_folder(folder: Path) -> None:
    """Make sure that a name is on disk, where the system can: that of a new file is lost with its folder's last writes."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def full_disk(error: BaseException | None) -> str | None:
    """The file that did not fit on the disk, "" if that is not said; None if the disk is not what went wrong.

    Libraries wrap it in errors of their own, and numpy only counts what it could not write.
    """
    seen: set[int] = set()  # errors may stand in a circle
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return str(error.filename or "")
            if error.errno is None and re.search(r"\d+ requested and \d+ written", str(error)):
                return ""
        if re.search(r"No space left on device|os error 28\b|Disk quota exceeded", str(error)):
            return ""
        error = error.__cause__ or error.__context__
    return None
