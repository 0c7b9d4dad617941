"""Records: a run is continued only with the inputs that it began with."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from erta.errors import ErtaError
from experiments.harness import calibrations, pair
from experiments.harness.calibrations import kept_path
from experiments.harness.config import CONF
from experiments.output import clips, tracking
from experiments.output.files import append_line, read_lines
from experiments.output.provenance import environment
from experiments.output.run_folder import check_inputs, mark_finished, open_folder
from tests.commands import folders


def no_space_for(monkeypatch, part: str) -> None:
    """Every file with this in its path fails to be opened for writing, as on a full disk."""
    plain = builtins.open

    def opened(file, mode="r", *arguments, **options):
        if set(mode) & set("wax+") and not isinstance(file, int) and part in os.fspath(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(file))
        return plain(file, mode, *arguments, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)


def test_output_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, printed = command(f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert code == 1 and "error:" in printed and "Traceback" not in printed


def test_full_disk_keeps_what_was_finished(command, tmp_path, monkeypatch):
    append, calls = pair.append_line, []

    def full(path, row):
        if calls:
            with open(path, "a") as file:
                file.write('{"index": 1, "pro')  # half a line reaches the disk
            raise OSError(28, "No space left on device", str(path))
        calls.append(1)
        append(path, row)

    monkeypatch.setattr(pair, "append_line", full)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 1 and "disk is full" in printed
    (folder,) = folders(tmp_path)
    monkeypatch.setattr(pair, "append_line", append)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 0 and "1 of 3 prompts are done" in printed and folders(tmp_path) == [folder]
    assert [row["index"] for row in read_lines(folder / "per_prompt.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize(
    "what",
    ["report.html", "wandb/", *(pytest.param(name, marks=pytest.mark.slow) for name in ("figures/", "record.json"))],
)
def test_a_full_disk_in_any_write_is_one_message(command, tmp_path, monkeypatch, what):
    """No traceback, nothing finished lost, and the same command goes on. Mutants: a figure left out without a word; a run that
    goes on without W&B's files and with a disk that is full.
    """
    job = ("cache=uniform", "bench=fidelity", "wandb.mode=offline", "hydra.run.dir=out")
    with monkeypatch.context() as disk:
        no_space_for(disk, what)
        code, printed = command(*job)
    said = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 1 and len(said) == 1 and "the disk is full" in said[0] and what in said[0], printed
    assert "Traceback" not in printed and not (tmp_path / "out" / "record.json").exists()
    done = len(read_lines(tmp_path / "out" / "per_prompt.jsonl"))
    assert done == (0 if what == "wandb/" else 3) and not list((tmp_path / "out").rglob("*.partial*"))
    if what == "record.json":
        code, printed = command(*job)
        assert code == 0 and "3/3" in printed, printed
        record = json.loads((tmp_path / "out" / "record.json").read_text())
        assert record["metrics"]["psnr_db"] > 0 and (tmp_path / "out" / "report.html").is_file()


def test_a_full_disk_after_the_record_costs_the_tracker_alone(tmp_path):
    """Mutant: a finished run that ends as if the same command had something left to do."""

    class Full:
        def log(self, *arguments, **options):
            raise OSError(28, "No space left on device")

        def finish(self, exit_code):
            pass

        step = 0

    (tmp_path / "state.json").write_text('{"finished": false}')
    with pytest.raises(OSError, match="No space left"):
        tracking.Tracker(Full(), tmp_path).log({"psnr_db": 1.0})
    (tmp_path / "state.json").write_text('{"finished": true}')
    tracking.Tracker(Full(), tmp_path).log({"psnr_db": 1.0})


@pytest.mark.slow
def test_another_runs_folder_is_left_alone(command, tmp_path):
    assert command("cache=uniform", "bench=fidelity", "hydra.run.dir=out")[0] == 0
    before = (tmp_path / "out" / "record.json").read_text()
    code, printed = command("cache=none", "bench=fidelity", "hydra.run.dir=out")
    assert code == 1 and "holds another run" in printed
    assert (tmp_path / "out" / "record.json").read_text() == before


def test_changed_prompts_do_not_mix_with_finished_rows(command, tmp_path, monkeypatch):
    prompts, append, calls = Path("p.txt"), pair.append_line, []
    prompts.write_text("a red circle\na blue star\na green box\n")

    def interrupted(path, row):
        append(path, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(pair, "append_line", interrupted)
    assert command("cache=uniform", "bench=fidelity", "bench.prompts=p.txt")[0] == 130
    prompts.write_text("a purple circle\na blue star\na green box\n")
    code, printed = command("cache=uniform", "bench=fidelity", "bench.prompts=p.txt")
    assert code == 1 and "prompts changed" in printed and "resume=false" in printed and not calls


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("chosen", [True, False])
def test_other_weights_do_not_continue_a_run(tmp_path, chosen):
    """Mutant: a folder named by the user forgets what its rows were made with."""
    with open_folder(config(), tmp_path / "outputs" / "run", chosen) as folder:
        check_inputs(folder, {"weights": "a"})
        append_line(folder / "rows.jsonl", {"row": 1})
    with open_folder(config(), tmp_path / "outputs" / ("run" if chosen else "later"), chosen) as again:
        assert again == folder
        check_inputs(again, {"weights": "a"})
        with pytest.raises(ErtaError, match="weights changed since the run in .* began: start anew with resume=false"):
            check_inputs(again, {"weights": "b"})
    assert read_lines(folder / "rows.jsonl") == [{"row": 1}]


@pytest.mark.parametrize("how", ["finished", "resume=false"])
def test_a_new_run_in_the_same_folder_starts_with_nothing(tmp_path, how):
    """Mutants: the old inputs kept, so that new weights are refused for ever; a comparison's old set-up times kept."""
    with open_folder(config(), tmp_path / "run", True) as folder:
        check_inputs(folder, {"weights": "a"})
    append_line(folder / "rows.jsonl", {"row": 1})
    append_line(folder / "arms.jsonl", {"row": 1, "calibration_s": 9.0})
    (folder / "left_out.json").write_text('{"row": "why"}')
    if how == "finished":
        mark_finished(folder)
    with open_folder(config(*([how] if "=" in how else [])), folder, True):
        check_inputs(folder, {"weights": "b"})
    assert read_lines(folder / "rows.jsonl") == read_lines(folder / "arms.jsonl") == []
    assert not (folder / "left_out.json").exists()


def test_the_command_says_what_decides_the_result(monkeypatch):
    """Mutant: a path of the machine in records that are shared."""
    typed = [
        "/somewhere/run.py",
        "model=wan21_tiny",
        "hydra.run.dir=/somewhere/x",
        "wandb.mode=offline",
        "cache.steps=25",
    ]
    monkeypatch.setattr(sys, "argv", typed)
    assert environment()["command"] == "python run.py model=wan21_tiny cache.steps=25"


@pytest.mark.slow
def test_rows_that_stand_twice_and_torn_previews_are_made_anew(command, tmp_path):
    """Mutants: rows counted, so that a prompt twice there stands for another; a truncated preview blocks the run for ever."""
    job = ("cache=uniform", "bench=fidelity", "hydra.run.dir=out")
    assert command(*job)[0] == 0
    folder = tmp_path / "out"
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    lines = (folder / "per_prompt.jsonl").read_text().splitlines(keepends=True)
    foreign = json.dumps({**rows[0], "index": 0, "seed": 77}) + "\n"
    (folder / "per_prompt.jsonl").write_text(foreign + lines[0] + lines[1] + lines[1])
    preview = folder / "samples" / "cached" / "000.webp"
    preview.write_bytes(preview.read_bytes()[:300])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "finished": False}))
    code, printed = command(*job)
    assert code == 0 and "1 of 3 prompts are done" in printed and "foreign, or twice there" in printed, printed
    again = json.loads((folder / "record.json").read_text())
    assert again["metrics"]["psnr_db"] == record["metrics"]["psnr_db"] and again["forced"] == []
    found = read_lines(folder / "per_prompt.jsonl")
    assert sorted(row["index"] for row in found) == [0, 1, 2] and clips.is_whole(preview)


@pytest.mark.slow
def test_other_code_does_not_continue_a_run_unless_it_is_forced(command, tmp_path, monkeypatch):
    """Mutant: rows of two versions of the code in one record, which does not say so."""
    append = pair.append_line

    def interrupted(path, row):
        append(path, row)
        raise KeyboardInterrupt

    job = ("cache=uniform", "bench=fidelity", "hydra.run.dir=out")
    monkeypatch.setattr(pair, "append_line", interrupted)
    assert command(*job)[0] == 130
    monkeypatch.setattr(pair, "append_line", append)
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    state["inputs"]["source"] = "another"
    (tmp_path / "out" / "state.json").write_text(json.dumps(state))
    code, printed = command(*job)
    assert code == 1 and "source changed since the run in" in printed and "resume=force" in printed
    code, printed = command(*job, "resume=force")
    assert code == 0 and json.loads((tmp_path / "out" / "record.json").read_text())["forced"] == ["source"]


@pytest.mark.parametrize("content", ["[]", "{", "3", '{"config_hash": 3}'])
def test_a_foreign_state_file_breaks_nothing(tmp_path, content):
    foreign = tmp_path / "outputs" / "day" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "state.json").write_text(content)
    with open_folder(config(), tmp_path / "outputs" / "day" / "run", False) as folder:
        assert folder.name == "run"
    assert (foreign / "state.json").read_text() == content


def test_a_command_that_fails_leaves_no_folder(command, tmp_path):
    for bad in ("calibration.path=nowhere.safetensors", "seed=-1", "bench.prompts=nowhere.txt"):
        assert command(bad)[0] == 1 and not (tmp_path / "outputs").exists(), bad
    code, printed = command("hydra.run.dir=")
    assert code == 1 and "names no folder" in printed and not (tmp_path / ".hydra").exists()


def test_another_folder_where_the_working_one_cannot_be_written(tmp_path, monkeypatch):
    """Calibrations too. Mutant: outputs/calibrations of the working folder, whatever that is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kept_path("a.json") == Path("outputs/calibrations/a.json")
    monkeypatch.setattr(calibrations.os, "access", lambda place, mode: "home" in str(place) or place != tmp_path)
    (tmp_path / "home").mkdir()
    assert kept_path("a.json") == tmp_path / "home" / ".cache" / "erta" / "calibrations" / "a.json"
    Path("outputs/calibrations").mkdir(parents=True)
    Path("outputs/calibrations/a.json").write_text("{}")
    assert kept_path("a.json") == Path("outputs/calibrations/a.json")
