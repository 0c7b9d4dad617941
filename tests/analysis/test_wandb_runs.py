"""W&B runs read back: from their files, whole or cut off, and from the server's API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from analysis import wandb_runs
from analysis.records import RecordError

CONFIG = {"experiment": {"name": "main"}, "model": {"name": "tiny"}, "cache": {"name": "uniform", "options": [1, None]}}
KEY = "0" * 40


def log(folder: Path, points: int, run_id: str = "abc", config: dict | None = None, **summary) -> Path:
    """A run offline of so many points; its file."""
    settings = wandb.Settings(disable_git=True, save_code=False, console="off", silent=True)
    run = wandb.init(
        mode="offline",
        project="p",
        id=run_id,
        name="named",
        dir=str(folder),
        config=config or CONFIG,
        settings=settings,
    )
    for step in range(points):
        run.log({f"row {k} (25)/psnr_db": step + k / 3 for k in range(9)}, step=step, commit=True)
    run.summary.update(summary)
    run.finish()
    wandb.teardown()  # the service writes the last of a file after `finish` has returned
    return max(wandb_runs.find_files(folder), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Path:
    """A file of several blocks, with a record that is longer than one."""
    return log(tmp_path_factory.mktemp("long"), 120, frame=[{"psnr_db": 1 / 3, "reason": None, "title": "x" * 70_000}])


def test_files_are_read_as_the_library_reads_them(long_run):
    """`wandb leet inspect` is the oracle. Mutants: a block's padding not skipped, parts of a record in another order."""
    assert long_run.stat().st_size > 3 * wandb_runs.BLOCK
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(long_run)],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    (run,) = wandb_runs.read_files([long_run], pytest.fail)
    assert run.history == [line["history"]["item"] for line in theirs if line["type"] == "history"]
    assert len(run.history) == 120 and run.history[7]["row 1 (25)/psnr_db"] == 7 + 1 / 3
    assert run.config == CONFIG and (run.id, run.name, run.state) == ("abc", "named", "finished") and run.is_ours
    assert run.summary["frame"] == [{"psnr_db": 1 / 3, "reason": None, "title": "x" * 70_000}]


@pytest.mark.parametrize("cut", [1, 5000, 33_000, 40_000, -3])
def test_of_a_killed_run_all_that_is_whole_is_read(long_run, tmp_path, cut):
    """Mutants: the whole file refused; a damaged record read; the run taken for finished; nothing said."""
    said: list[str] = []
    path = tmp_path / "run-abc.wandb"
    path.write_bytes(long_run.read_bytes()[:cut])
    found = wandb_runs.read_files([path], said.append)
    if cut == 1:
        assert not found and f"{path} is not a W&B file, or was cut off" in said[0]
        return
    (run,) = found
    (whole,) = wandb_runs.read_files([long_run], pytest.fail)
    assert run.state == "unfinished" and len(said) == 1 and "ends in the middle of a record" in said[0]
    assert 0 < len(run.history) <= len(whole.history) and run.history == whole.history[: len(run.history)]


def test_a_damaged_record_ends_the_file(long_run, tmp_path):
    """Mutant: the checksum not looked at."""
    data = bytearray(long_run.read_bytes())
    data[40_000] ^= 255
    (tmp_path / "run-abc.wandb").write_bytes(data)
    said: list[str] = []
    (run,) = wandb_runs.read_files([tmp_path / "run-abc.wandb"], said.append)
    assert 0 < len(run.history) < 120 and len(said) == 1


def test_files_of_one_id_are_one_run(tmp_path):
    """Mutants: two runs; points of both counted; the earlier one's end counts; `latest-run` read as a third file."""
    first = log(tmp_path, 2, psnr_db=1.0, early=True)
    time.sleep(1)  # their folders are named after the second
    second = log(tmp_path, 3, psnr_db=2.0)
    log(tmp_path / "other", 1, run_id="xyz")
    assert len(wandb_runs.find_files(tmp_path)) == 3
    for order in ([first, second], [second, first]):
        (run,) = wandb_runs.read_files(order, pytest.fail)
        assert [line["_step"] for line in run.history] == [0, 1, 2]
        assert run.summary["psnr_db"] == 2.0 and run.summary["early"] is True
    assert len(wandb_runs.read_files(wandb_runs.find_files(tmp_path), pytest.fail)) == 2


@pytest.mark.parametrize("path", ["", "project", "a/b/c", "a/", "/"])
def test_a_path_online_names_entity_and_project(path):
    with pytest.raises(RecordError, match=f"wandb:{path}: give the entity and the project, wandb:ENTITY/PROJECT"):
        wandb_runs.read_api(path, api=object())


def test_a_project_that_the_server_does_not_know():
    class Api:
        def runs(self, path, order):
            raise ValueError(f"Could not find project {path}\nand more")

    with pytest.raises(RecordError, match="^wandb:a/b cannot be read: Could not find project a/b$"):
        wandb_runs.read_api("a/b", Api())


def looked(**environment: str) -> tuple[str, float]:
    """What `check_access` says in a process of its own, and after how many seconds."""
    code = "from analysis.wandb_runs import check_access; import time; t = time.monotonic()\n"
    code += "try: check_access()\nexcept Exception as error: print(type(error).__name__, error)\n"
    code += "print(time.monotonic() - t)"
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env = {**known, "NETRC": os.devnull, "HOME": "/nonexistent", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    *said, seconds = done.stdout.splitlines()
    return " ".join(said), float(seconds)


def test_online_without_a_key():
    said, _ = looked()
    assert said.startswith("RecordError W&B online needs a key: `wandb login`, or set WANDB_API_KEY")
    assert "W&B refuses the key" in looked(WANDB_API_KEY="short")[0]


@pytest.mark.slow
def test_online_without_a_server():
    """One that refuses, and one that takes the call and says nothing. Mutant: minutes of silence."""
    said, seconds = looked(WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "the W&B server cannot be used: http://127.0.0.1:9 does not answer" in said and seconds < 10
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said, seconds = looked(WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "did not answer in time" in said and seconds < 10
