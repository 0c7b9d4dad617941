"""Prompt files: what is read from each format, and what is said about each way to get one wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import erta
from erta.errors import ErtaError
from experiments.output.files import read_lines
from experiments.prompts.files import FilePrompt, read_prompt_file
from tests.commands import folders

COCO = {
    "info": {},
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A red bus\non a street. "},
        {"image_id": 3, "id": 2, "caption": "A cat."},
        {"image_id": 7, "id": 3, "caption": "The same bus."},
        {"image_id": 12, "id": 4, "caption": "A dog."},
    ],
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_formats_by_suffix(tmp_path):
    """Mutants: ids counted from one, seeds dropped, captions sorted by image or the last of an image, a byte order
    mark or a line separator inside a prompt taken for text or an end of line."""
    lines = "\ufeffa red circle \r\na blue\u2028star\r\n"
    assert read_prompt_file(written(tmp_path, "a.txt", lines)) == [
        FilePrompt("a red circle", "000"), FilePrompt("a blue\u2028star", "001"),
    ]  # fmt: skip
    entries = [{"prompt": "a", "id": "first", "seed": 0}, {"prompt": " b "}, {"prompt": "c", "id": 5, "seed": 42}]
    content = "\n".join(json.dumps(entry) for entry in entries)
    assert read_prompt_file(written(tmp_path, "a.JSONL", content)) == [
        FilePrompt("a", "first", 0), FilePrompt("b", "001"), FilePrompt("c", "5", 42),
    ]  # fmt: skip
    assert read_prompt_file(written(tmp_path, "captions.json", json.dumps(COCO))) == [
        FilePrompt("A red bus on a street.", "7"), FilePrompt("A cat.", "3"), FilePrompt("A dog.", "12"),
    ]  # fmt: skip


BAD = {
    "empty line": ("p.txt", "a red circle\n\na blue star\n", "line 2 is empty"),
    "empty last line": ("p.txt", "a red circle\n\n", "line 2 is empty"),
    "empty file": ("p.txt", "", "holds no prompts"),
    "Latin-1": ("p.txt", b"one\ncaf\xe9\n", "line 2 is not UTF-8"),
    "empty line of JSON": ("p.jsonl", '{"prompt": "a"}\n\n', "line 2 is empty"),
    "broken JSON": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON: Expecting"),
    "not an object": ("p.jsonl", '"a"\n', "line 1 has no prompt"),
    "no prompt": ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no prompt"),
    "blank prompt": ("p.jsonl", '{"prompt": "  "}\n', "line 1 has no prompt"),
    "prompt is a number": ("p.jsonl", '{"prompt": 3}\n', "line 1 has no prompt"),
    "unknown key": ("p.jsonl", '{"prompt": "a", "sead": 3}\n', "unknown key 'sead'"),
    "seed is text": ("p.jsonl", '{"prompt": "a", "seed": "3"}\n', 'seed must be an integer from 0 to 2^63 - 1, not "3"'),
    "seed is a fraction": ("p.jsonl", '{"prompt": "a", "seed": 3.0}\n', "not 3.0"),
    "seed is a truth value": ("p.jsonl", '{"prompt": "a", "seed": true}\n', "not true"),
    "negative seed": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": -1}\n', "line 2: seed must be"),
    "seed too large": ("p.jsonl", f'{{"prompt": "a", "seed": {2**63}}}\n', "seed must be"),
    "id is a list": ("p.jsonl", '{"prompt": "a", "id": []}\n', "id must be text or an integer, not []"),
    "ids twice": ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "line 2: the id '1' is that of line 1"),
    "id of a place": ("p.jsonl", '{"prompt": "a", "id": "001"}\n{"prompt": "b"}\n', "line 2: the id '001'"),
    "broken captions": ("p.json", '{"annotations": [\n{"image_id": 1,\n]}', "line 3 is not JSON"),
    "not captions": ("p.json", '["a", "b"]', 'has no "annotations"'),
    "no image": ("p.json", '{"annotations": [{"caption": "a"}]}', "annotation 1 has no image_id"),
    "no caption": ("p.json", '{"annotations": [{"image_id": 1}]}', "annotation 1 has no caption"),
    "no captions at all": ("p.json", '{"annotations": []}', "holds no prompts"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_their_line(tmp_path, case):
    name, content, expected = BAD[case]
    path = written(tmp_path, name, content)
    with pytest.raises(ErtaError) as error:
        read_prompt_file(path)
    assert expected in str(error.value) and str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(ErtaError, match=f"cannot read the prompts from {path}: "):
            read_prompt_file(path)


@pytest.mark.slow
def test_a_run_takes_ids_and_seeds_from_its_files(command, tmp_path):
    """Mutants: the file's seed replaced by a counted one, its id by the index, test prompts used for calibration."""
    tests = [
        {"prompt": "a red circle", "id": "circle", "seed": 77},
        {"prompt": "a blue star"},
        {"prompt": "a green box"},
    ]
    written(tmp_path, "tests.jsonl", "\n".join(map(json.dumps, tests)))
    written(tmp_path, "calibration.txt", "a large yellow star\na small red box\na blue circle\n")
    code, printed = command(
        "cache=policy", "bench=fidelity", "bench.prompts=tests.jsonl", "calibration.prompts=calibration.txt", "seed=5"
    )
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    rows = read_lines(folder / "per_prompt.jsonl")
    found = [(row["id"], row["prompt"], row["seed"]) for row in rows]
    assert found == [("circle", "a red circle", 77), ("001", "a blue star", 6), ("002", "a green box", 7)]
    (path,) = Path("outputs/calibrations").glob("*.safetensors")
    assert erta.Calibration.load(path).record["prompts"] == ["a large yellow star", "a small red box"]
    # a second file: another calibration beside the first, which is kept and found again
    written(tmp_path, "other.txt", "a large blue star\na small red box\n")
    again = ("cache=policy", "bench=fidelity", "bench.num_prompts=1")
    assert command(*again, "calibration.prompts=other.txt", "hydra.run.dir=outputs/a/b")[0] == 0
    code, printed = command(*again, "calibration.prompts=calibration.txt", "hydra.run.dir=outputs/a/c")
    assert code == 0 and f"calibration: {path}" in printed
    assert len(list(Path("outputs/calibrations").glob("*.safetensors"))) == 2


def test_calibration_prompts_that_cannot_be_used(command, tmp_path):
    def said(*arguments: str) -> str:
        code, printed = command("cache=policy", "bench=fidelity", *arguments)
        message = printed[printed.index("error:") :].strip()
        assert code == 1 and len(message.splitlines()) <= 2 and "Traceback" not in printed
        return message

    written(tmp_path, "one.txt", "a red circle\n")
    written(tmp_path, "word.txt", "a red circle\na red zebra\n")
    written(tmp_path, "seed.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a red box", "seed": 1}\n')
    assert "calibration.num_prompts=2, but one.txt holds only 1" in said("calibration.prompts=one.txt")
    assert "'zebra'" in said("calibration.prompts=word.txt")
    assert "seed.jsonl gives a seed to '001'" in said("calibration.prompts=seed.jsonl")
    assert "cannot read the prompts from none.txt" in said("calibration.prompts=none.txt")
    assert "would not be read" in said("calibration.prompts=one.txt", "calibration.path=x.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"a red circle\ra blue star\r", "line 1 ends in a carriage return alone"),
        ("p.txt", b"a red circle\n\x00\n", r"line 2 holds '\\x00'"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a\\ud800"}\n', "line 2 holds"),
        ("p.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n", "line 2 is nested too deeply"),
        ("p.json", b"[" * 100_000, "line 1 is nested too deeply"),
        ("p.jsonl", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
    ],
)
def test_content_that_is_no_text(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ErtaError, match=said):
        read_prompt_file(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    """Mutant: a command that hangs until somebody writes."""
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(ErtaError, match="line 1 cannot be read twice: it is a pipe"):
        read_prompt_file(tmp_path / "p.txt")
