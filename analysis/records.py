"""What runs leave behind, typed: one dataclass a kind of record. Written by `experiments`, read here without guessing.

A run folder holds `record.json`; tables have a line a sample in `rows.jsonl`, a line a row in `setups.jsonl`, and the rows
that were not sampled in `left_out.json`. What lies in folders of earlier versions is brought to today's form when it is read
(`analysis.earlier`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from analysis.schema import (
    CalibrationRecord,
    Claim,
    DecompositionRecord,
    FigureRecord,
    MainRecord,
    Measured,
    Memory,
    ModelCardRecord,
    Planned,
    Record,
    Row,
    Rows,
    RowScores,
    RowSetup,
    RowsRecord,
    Sample,
    SpeedRecord,
    Steps,
    Table,
    Timing,
)

__all__ = [
    "LEFT_OUT",
    "ORACLE",
    "PER_PROMPT",
    "RECORD",
    "ROWS",
    "SCORES",
    "SETUPS",
    "UNCACHED",
    "CalibrationRecord",
    "Claim",
    "DecompositionRecord",
    "FigureRecord",
    "MainRecord",
    "Measured",
    "Memory",
    "ModelCardRecord",
    "Planned",
    "Record",
    "RecordError",
    "Row",
    "RowScores",
    "RowSetup",
    "Rows",
    "RowsRecord",
    "Sample",
    "SpeedRecord",
    "Steps",
    "Table",
    "Timing",
    "parse",
    "read",
    "read_kept",
    "read_rows",
    "read_table",
    "to_json",
    "utf8",
    "write_bundle",
    "write_record",
]

RECORD, ROWS, SETUPS, LEFT_OUT, SCORES, PER_PROMPT = (
    "record.json",
    "rows.jsonl",
    "setups.jsonl",
    "left_out.json",
    "scores.jsonl",
    "per_prompt.jsonl",
)


class RecordError(ValueError):
    """A file that is no record, or not a whole one; the message names it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the message, and not the way there."""
        return [f"error: {self}"]


_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
_SAMPLE, _SETUP, _SCORES = TypeAdapter(Sample), TypeAdapter(RowSetup), TypeAdapter(RowScores)
ORACLE = "oracle"  # group of rows that have seen the test samples: no methods, and they beat nothing
UNCACHED = "uncached"  # key of the uncached samples among the scores


def parse(data: Any, where: Path) -> Record:
    """A record of any kind and version. Raises RecordError."""
    from analysis import earlier

    try:
        return _RECORD.validate_python(earlier.record(data, where))
    except (KeyError, TypeError, AttributeError) as error:  # of an earlier version, and not whole
        raise RecordError(f"{where} is not a whole record: it lacks {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{where} is not a whole record: {place or 'it'}: {first['msg'].lower()}") from error


def read(path: str | Path) -> Record:
    """The record of a run folder, or in a file. Raises RecordError if there is none, or it is damaged."""
    from analysis import earlier

    path = Path(path)
    if path.is_dir():
        path = next((file for name in (RECORD, *earlier.NAMES) if (file := path / name).is_file()), path / RECORD)
    return parse(_json(path), path)


def read_rows(path: str | Path) -> Rows:
    """A table with its samples: a run folder, finished or not, or a file of `analysis/data`. Raises RecordError."""
    from analysis import earlier

    path = Path(path)
    if path.is_dir():
        data = {
            "record": _json(path / RECORD),
            "samples": list(_lines(path / ROWS)),
            "setups": [*_lines(path / SETUPS), *_lines(path / earlier.SETUPS)],
            "left_out": _json(path / LEFT_OUT) if (path / LEFT_OUT).is_file() else {},
            "scores": list(_lines(path / SCORES)),
        }
    else:
        data = _json(path)
        if not isinstance(data, dict) or not {"record", "samples", "setups", "left_out"} <= set(data):
            raise RecordError(f"{path} holds no rows: give the run folder, or a file of analysis/data")
    record = parse(data["record"], path)
    if not isinstance(record, RowsRecord):
        raise RecordError(f"{path} holds no rows: it is a record of the kind {record.kind!r}")
    try:
        lines = earlier.lines(data)
        samples = [_SAMPLE.validate_python(line) for line in lines["samples"]]
        setups = {(one := _SETUP.validate_python(line)).row: one for line in lines["setups"]}
        scored = [_SCORES.validate_python(line) for line in data.get("scores", ())]
        return Rows(
            record=record, samples=samples, setups=setups, left_out=data["left_out"], scores={s.row: s for s in scored}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: a row is not whole: it lacks {error}") from error
    except ValidationError as error:
        raise RecordError(f"{path}: a row is not whole: {error.errors()[0]['msg'].lower()}") from error


def read_table(path: str | Path) -> Rows | FigureRecord:
    """What a table or a figure is made of: a run folder, or a file of `analysis/data`. Raises RecordError."""
    made = read_kept(path)
    if isinstance(made, (Rows, FigureRecord)):
        return made
    if isinstance(made, RowsRecord):
        raise RecordError(f"{path} holds no rows: give the run folder, or a file of analysis/data")
    raise RecordError(f"{path} holds no rows: it is a record of the kind {made.kind!r}")


def read_kept(path: str | Path) -> Rows | Record:
    """What a run folder, or a file of `analysis/data`, holds: a table with its samples, or a record. Raises RecordError."""
    path = Path(path)
    if path.is_dir():
        record = read(path)
        return read_rows(path) if isinstance(record, RowsRecord) else record
    data = _json(path)
    return read_rows(path) if isinstance(data, dict) and "samples" in data else parse(data, path)


def to_json(record: Any) -> dict[str, Any]:
    """A record, sample or setup as plain data."""
    return asdict(record)


def utf8(text: str) -> bytes:
    r"""Text as UTF-8, whatever it is: half a surrogate pair, which has no bytes, becomes `\udXXX`.

    In JSON, where it stands in a string, that is read back as it was.
    """
    return text.encode("utf-8", "backslashreplace")


def write_bundle(rows: Rows, path: Path) -> None:
    """A table with its samples as one gzipped JSON file, the same bytes for the same rows."""
    data = {
        "record": to_json(rows.record),
        "samples": [to_json(one) for one in rows.samples],
        "setups": [to_json(one) for one in rows.setups.values()],
        "left_out": rows.left_out,
        "scores": [to_json(one) for one in rows.scores.values()],
    }
    _write_gzip(data, path)


def write_record(record: Record, path: Path) -> None:
    """A record as one gzipped JSON file, the same bytes for the same record."""
    _write_gzip(to_json(record), path)


def _write_gzip(data: Any, path: Path) -> None:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(utf8(text), mtime=0))


def _json(path: Path) -> Any:
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError as error:
        raise RecordError(f"{path.parent if path.name == RECORD else path} holds no record") from error
    except (OSError, ValueError, EOFError) as error:
        raise RecordError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _lines(path: Path) -> Iterator[Any]:
    """Whole lines; what a crash left of the last one is passed over. Raises RecordError for another that is none."""
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{path}, line {number}, is damaged: delete it; the run makes it anew") from error
