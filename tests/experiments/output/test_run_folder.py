"""Records: a run is continued only with the inputs that it began with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from erta.errors import ErtaError
from experiments.harness import pair
from experiments.harness.config import CONF
from experiments.output.files import append_line, read_lines
from experiments.output.run_folder import check_inputs, environment, mark_finished, open_folder
from tests.commands import folders


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
