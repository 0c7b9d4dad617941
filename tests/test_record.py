"""Records: a run is continued only with the inputs that it began with."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from erta.errors import ErtaError
from experiments.config import CONF
from experiments.record import append_line, check_inputs, mark_finished, open_folder, read_lines


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("chosen", [True, False])
def test_other_weights_do_not_continue_a_run(tmp_path, chosen):
    """Mutant: a folder named by the user forgets what its rows were made with."""
    folder = open_folder(config(), tmp_path / "outputs" / "run", chosen)
    check_inputs(folder, {"weights": "a"})
    append_line(folder / "rows.jsonl", {"row": 1})
    again = open_folder(config(), tmp_path / "outputs" / ("run" if chosen else "later"), chosen)
    assert again == folder
    check_inputs(again, {"weights": "a"})
    with pytest.raises(ErtaError, match="weights changed since the run in .* began: start anew with resume=false"):
        check_inputs(again, {"weights": "b"})
    assert read_lines(folder / "rows.jsonl") == [{"row": 1}]


@pytest.mark.parametrize("how", ["finished", "resume=false"])
def test_a_new_run_in_the_same_folder_starts_with_nothing(tmp_path, how):
    """Mutants: the old inputs kept, so that new weights are refused for ever; a comparison's old set-up times kept."""
    folder = open_folder(config(), tmp_path / "run", True)
    check_inputs(folder, {"weights": "a"})
    append_line(folder / "rows.jsonl", {"row": 1})
    append_line(folder / "arms.jsonl", {"row": 1, "calibration_s": 9.0})
    (folder / "left_out.json").write_text('{"row": "why"}')
    if how == "finished":
        mark_finished(folder)
    open_folder(config(*([how] if "=" in how else [])), folder, True)
    check_inputs(folder, {"weights": "b"})
    assert read_lines(folder / "rows.jsonl") == read_lines(folder / "arms.jsonl") == []
    assert not (folder / "left_out.json").exists()
