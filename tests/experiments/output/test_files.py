"""Lines on disk: what is damaged, foreign or there twice goes, and nothing else."""

from __future__ import annotations

import errno
import os

import pytest

from experiments.output import files
from experiments.output.files import append_line, read_lines, read_object, read_own_lines


def test_a_damaged_line_takes_none_of_those_after_it(tmp_path):
    """Mutant: everything after the first damaged line cut off."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"index": 0}\n{"ind\xff\n[]\n{"index": 2}\n{"inde')
    assert read_lines(path) == [{"index": 0}, {"index": 2}]
    assert path.read_bytes() == b'{"index": 0}\n{"index": 2}\n'


def test_twice_there_or_foreign(tmp_path):
    """Mutant: rows counted, so that a line which is there twice stands for one that is missing."""
    path = tmp_path / "rows.jsonl"
    for index in (0, 1, 1, 2, 9):
        append_line(path, {"index": index})
    own = read_own_lines(path, lambda line: line["index"] if line["index"] < 4 else None)
    assert own == read_lines(path) == [{"index": 0}, {"index": 2}]


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_line(path, {"index": 0})
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_line(path, {"index": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "3", '{"a"', "[" * 100_000, "\0"])
def test_something_else_is_no_object(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    assert read_object(tmp_path / "state.json") == {}
