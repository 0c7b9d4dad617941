"""Sweeps through the command line: their table, what fails, what is kept when they go on."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from analysis import sweeps
from analysis.records import to_json
from erta.errors import ErtaError
from experiments import main
from experiments.output import sweep
from tests.analysis.test_sweeps import main_record
from tests.commands import config

BASE = ("-m", "cache=uniform", "bench=fidelity", "bench.num_prompts=1")


def sweep_folders() -> list[Path]:
    return sorted(path.parent for path in Path("outputs").glob("*/*/sweep.json"))


@pytest.fixture
def counted(monkeypatch):
    """The computed steps of every run that is really made, in order."""
    real, made = main.run, []

    def run(cfg, folder):
        made.append(cfg.cache.steps)
        real(cfg, folder)

    monkeypatch.setattr(main, "run", run)
    return made


@pytest.mark.slow
def test_sweep_ends_in_a_table_and_names_what_failed(command, counted):
    """Exit code 1, yet all others run; given again, only what failed is tried again, in the same folder.

    Mutants: Hydra's error at the end hides the table; finished runs are made anew.
    """
    code, printed = command(*BASE, "cache.steps=3,9,2")
    (folder,) = sweep_folders()
    assert code == 1 and "Traceback" not in printed and counted == [3, 2]
    assert "failed: cache.steps=9: cache.steps=9 must lie between 1 and model.num_inference_steps=6" in printed
    assert printed.rstrip().splitlines()[-1].startswith("error: 1 of 3 runs failed. The same command tries them again")
    data = pd.read_csv(folder / "table.csv")
    assert data["cache.steps"].tolist() == [3, 9, 2] and data.state.tolist() == ["finished", "failed", "finished"]
    assert data.computed.tolist()[::2] == [3, 2] and data.psnr_db.notna().tolist() == [True, False, True]
    assert (folder / "sweep.png").is_file() and "| 9 | failed |" in (folder / "table.md").read_text()
    code, printed = command(*BASE, "cache.steps=3,9,2")
    assert code == 1 and counted == [3, 2] and sweep_folders() == [folder]
    assert printed.count("kept, as it is finished") == 2 and "going on with the sweep" in printed


@pytest.mark.slow
def test_interrupted_sweep_goes_on(command, monkeypatch):
    """In its folder: what is finished is kept, what was begun goes on; when all is done, the same command begins anew."""
    real, made = main.run, []

    def stopped(cfg, folder):
        made.append((folder, cfg.cache.steps))
        if len(made) == 2:
            (folder / "begun").touch()
            raise KeyboardInterrupt
        real(cfg, folder)

    monkeypatch.setattr(main, "run", stopped)
    code, printed = command(*BASE, "cache.steps=3,2,4")
    (folder,) = sweep_folders()
    assert code == 130 and "the same command goes on" in printed and not (folder / "table.md").exists()
    assert [member.state for member in sweeps.read_members(folder)] == ["finished", "started"]
    code, printed = command(*BASE, "cache.steps=3,2,4")
    assert code == 0 and sweep_folders() == [folder], printed
    assert [steps for _, steps in made] == [3, 2, 2, 4] and made[2][0] == made[1][0]
    assert (made[1][0] / "record.json").is_file() and (made[1][0] / "begun").exists()
    code, _ = command(*BASE, "cache.steps=3,2,4")
    assert code == 0 and len(sweep_folders()) == 2 and len(made) == 7


@pytest.mark.slow
def test_named_folder_is_extended(command, counted):
    """Finished runs of the folder are taken under any number; the table shows this command's runs.

    Mutants: looked for under the same number; a run of another configuration is overwritten.
    """
    assert command(*BASE, "cache.steps=3,2", "hydra.sweep.dir=mine")[0] == 0
    records = {path: path.read_bytes() for path in Path("mine").glob("*/record.json")}
    code, printed = command(*BASE, "cache.steps=4,2,3", "hydra.sweep.dir=mine", "wandb.project=other")
    assert code == 0 and counted == [3, 2, 4] and printed.count("kept, as it is finished") == 2, printed
    assert all(path.read_bytes() == content for path, content in records.items()) and len(records) == 2
    assert len(list(Path("mine").glob("*/record.json"))) == 3
    assert pd.read_csv("mine/table.csv").computed.tolist() == [4, 2, 3]
    assert command(*BASE, "cache.steps=2,4", "hydra.sweep.dir=mine", "resume=false")[0] == 0
    assert counted == [3, 2, 4, 2, 4]


@pytest.mark.slow
def test_all_failed_and_none_swept(command):
    code, printed = command(*BASE, "cache.steps=8,9")
    assert code == 1 and "no plot: no run is finished" in printed and "2 of 2 runs failed" in printed
    code, printed = command(*BASE, "cache.steps=3")
    assert code == 0 and "no plot: no key was swept" in printed and "sweep: 1 run, wan21_tiny, 1 prompts" in printed
    code, printed = command("-m", "cache=magic,uniform")
    assert code == 1 and printed.strip().startswith("error: there is no cache=magic")


@pytest.mark.slow
def test_sweep_of_another_experiment(command):
    code, printed = command("-m", "experiment=model_card", "model=wan21,flux_dev", quick=False)
    assert code == 0, printed
    (folder,) = sweep_folders()
    lines = (folder / "table.md").read_text()
    assert "| model | state | result | folder |" in lines and lines.count("TFLOPs a sample |") == 2
    assert "| wan21 | finished | 1,4" in lines


def test_objective(tmp_path):
    """How far from the target, in dB. Mutants: signed; identical samples are the best there is."""
    cfg = config("sweep.target_psnr_db=45")
    for psnr, expected in (([40.0, 44.0], 3.0), ([50.0], 5.0), ([None], math.inf)):
        (tmp_path / "record.json").write_text(json.dumps(to_json(main_record(3, psnr))))
        assert sweep.objective(cfg, tmp_path) == expected
    assert sweep.objective(config(), tmp_path) is None


def test_sweeper_that_searches_needs_a_target(tmp_path):
    hydra = {
        "sweep": {"dir": str(tmp_path / "new")},
        "overrides": {"hydra": [], "task": []},
        "sweeper": {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"},
    }
    cfg = OmegaConf.create({"hydra": hydra, "sweep": {"target_psnr_db": None}, "resume": True})
    with pytest.raises(sweep.Refused) as refused:
        sweep.Begin().on_multirun_start(cfg)
    assert isinstance(refused.value.__cause__, ErtaError) and "sweep.target_psnr_db=45" in str(refused.value.__cause__)
    assert not (tmp_path / "new").exists()


def test_folder_of_a_sweep_that_cannot_be_made(command):
    Path("file").write_text("kept")
    code, printed = command(*BASE, "cache.steps=3,2", "hydra.sweep.dir=file")
    assert code == 1 and "error: cannot write to" in printed and Path("file").read_text() == "kept"


def test_search_for_a_threshold(command):
    """conf/hydra/sweeper/threshold.yaml, where Optuna is installed; else what is said to those who lack it."""
    arguments = ("-m", "bench=fidelity", "bench.num_prompts=1", "hydra/sweeper=threshold", "hydra.sweeper.n_trials=3")
    code, printed = command(
        *arguments, "sweep.target_psnr_db=30", "hydra.sweeper.params={cache.threshold:'interval(0.1, 2)'}"
    )
    if find_spec("optuna") is None:
        assert code == 1 and "pip install -e '.[sweeps]'" in printed
        return
    (folder,) = sweep_folders()
    found = sweeps.load(folder).finished
    best = OmegaConf.load(folder / "optimization_results.yaml").best_value
    assert code == 0 and len(found) == 3 and best == pytest.approx((found.psnr_db - 30).abs().min())
    assert "nearest to 30 dB: cache.threshold=" in printed
