"""W&B from every experiment: what is told, that a run goes on as one, and that a failure of W&B costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from analysis import wandb_runs
from analysis.records import RecordError
from analysis.runs import load_runs
from experiments import train_tiny
from experiments.harness import pair
from experiments.models import load
from experiments.output import run_folder, tracking
from tests.commands import config, folders

OFFLINE = "wandb.mode=offline"
COMMANDS = Path(tracking.__file__).parents[1].glob("*.py")


def told(folder: Path) -> list[wandb_runs.WandbRun]:
    """The W&B runs of a folder, read back from their files."""
    wandb.teardown()  # its service writes the last of a file after `finish` has returned
    problems: list[str] = []
    found = wandb_runs.read_files(wandb_runs.find_files(folder), problems.append)
    assert not problems
    return found


@pytest.fixture
def tracked(tmp_path):
    """A configuration offline and an empty run folder."""
    run_folder.write_json(tmp_path / "state.json", {"config_hash": "0", "finished": False})
    return config(OFFLINE), tmp_path


@pytest.mark.parametrize(
    "path", [path for path in COMMANDS if path.stem not in ("__init__", "cli")], ids=lambda p: p.stem
)
def test_every_command_has_a_tracker(path):
    """Mutant: a command that tells W&B nothing."""
    text = path.read_text()
    assert any(call in text for call in ("tracking.start(", "run_table(", "finish_figure(", "run_members("))


def test_numbers_of_a_sample():
    """Mutants: lists and texts sent, truth values lost, what is inside overwrites what is outside, all of a scene."""
    sample = {
        "index": 3, "prompt": "a circle", "psnr_db": np.float32(2.5), "lpips": None, "nan": float("nan"),
        "cached": {"forwards": 50, "mask": [1, 0], "scene": {"shape": True, "all": False}}, "scene": None, "ok": np.bool_(True),
    }  # fmt: skip
    wanted = {"index": 3, "psnr_db": 2.5, "nan": None, "cached/forwards": 50, "cached/scene": False, "ok": True}
    assert tracking.scalars(sample) == wanted


def test_what_is_told_comes_back(tracked, tmp_path):
    """Mutants: a point lost or merged with the next, the row not in the key, clips empty, a file left out of the artifact."""
    cfg, folder = tracked
    for name, grey in (("a", 0), ("b", 255)):
        frames = [Image.new("RGB", (32, 24), (grey, step * 60, 9)) for step in range(3)]
        frames[0].save(folder / f"{name}.webp", save_all=True, append_images=frames[1:], duration=50, lossless=True)
        frames[0].save(folder / f"{name}.png")
    (folder / "plan.json").write_text("{}")
    with tracking.start(cfg, folder) as tracker:
        tracker.log({"psnr_db": 30.0}, "uniform (25)")
        tracker.log({"psnr_db": 31.0})
        tracker.media("clips/000", {"uncached": folder / "a.webp", "cached": folder / "b.webp"}, "a circle")
        tracker.table("steps", ["step", "phi"], [[0, None], [1, np.float32(0.5)]])
        tracker.media("pictures/000", {name: folder / f"{name}.png" for name in "ab"})
        tracker.finish({"psnr_db": 30.5})
    (run,) = told(folder)
    assert run.state == "finished" and run.name == folder.name and run.config["model"]["name"] == "wan21_tiny"
    assert [line["_step"] for line in run.history] == [0, 1, 2, 3, 4]
    assert run.history[0]["uniform (25)/psnr_db"] == 30.0 and run.history[1]["psnr_db"] == 31.0
    assert run.summary["psnr_db"] == 30.5 and run.summary[wandb_runs.FRAME] == []
    files = next(folder.glob("wandb/offline-run-*/files"))
    (clip,) = files.glob("media/videos/clips/*.gif")
    with Image.open(clip) as image:
        assert image.n_frames == 3 and image.size == (32 + 32 + tracking.GAP_PX, 24) and image.info["duration"] == 50
        assert np.asarray(image.convert("RGB"))[12, [0, -1], 0].tolist() == [0, 255]
    (picture,) = files.glob("media/images/pictures/*.png")
    with Image.open(picture) as image:
        assert np.asarray(image)[12, [0, -1], 0].tolist() == [0, 255]
    (table,) = files.glob("media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[0, None], [1, 0.5]]
    assert any((folder / "wandb" / "data" / "artifacts").rglob("*")), "what waits to be sent lies beside the run"
    assert b"plan.json" in next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run(command, tmp_path, monkeypatch):
    """Mutants: a new id, finished samples not told again, the samples of both parts counted twice."""
    sample_all = pair.append_line

    def dies(path, row):
        sample_all(path, row)
        if row["index"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pair, "append_line", dies)
    assert command("cache=uniform", "bench=fidelity", OFFLINE)[0] == 130
    monkeypatch.setattr(pair, "append_line", sample_all)
    (folder,) = folders(tmp_path)
    (run,) = told(folder)
    assert run.state == "failed" and [line["index"] for line in run.history] == [0]
    code, printed = command("cache=uniform", "bench=fidelity", OFFLINE)
    assert code == 0, printed
    assert len(wandb_runs.find_files(folder)) == 2
    (both,) = told(folder)
    assert both.id == run.id == json.loads((folder / "state.json").read_text())["wandb_id"]
    assert both.state == "finished" and [line["index"] for line in both.history if "index" in line] == [0, 1, 2]
    last = wandb_runs.find_files(folder)[-1]
    (alone,) = wandb_runs.read_files([last], print)
    assert alone.history == both.history, "the last file is whole by itself"
    assert (both.config["experiment"]["name"], both.summary["identical"]) == ("main", False)


def test_commands_without_samples_tell_what_they_counted(command, tmp_path):
    """Mutants: W&B told before the record was written, a calibration without its profile, a row a site lost."""
    code, printed = command("experiment=model_card", "model=wan21", OFFLINE, "hydra.run.dir=card", quick=False)
    assert code == 0, printed
    (card,) = told(tmp_path / "card")
    assert [row["site"] for row in card.summary[wandb_runs.FRAME]] == ["output", "blocks"]
    assert card.summary["parameters"] == card.summary[wandb_runs.FRAME][0]["parameters"] > 1e9
    code, printed = command("experiment=calibrate", OFFLINE, "hydra.run.dir=calibration")
    assert code == 0, printed
    (calibration,) = told(tmp_path / "calibration")
    assert any(row.get("reuse_error", 0) > 0 for row in calibration.summary[wandb_runs.FRAME])
    tables = [
        json.loads(path.read_text())
        for path in (tmp_path / "calibration").glob("wandb/offline-run-*/files/media/table/*")
    ]
    profile = next(table["data"] for table in tables if table["columns"] == ["step", "mean", "std"])
    assert [line[0] for line in profile] == list(range(6)) and profile[0][1] is None and profile[3][1] > 0


def test_curves_of_training_are_told_once(tracked):
    """Mutants: lines told at every look, parts under one name."""
    cfg, folder = tracked
    work, known = folder / "work", {}
    for part in ("vae", "clip/text"):
        (work / part).mkdir(parents=True)
        (work / part / "curve.jsonl").write_text('{"step": 20, "loss": 2.0}\n')
    with tracking.start(cfg, folder) as tracker:
        train_tiny.log_curves(tracker, work, known)
        with open(work / "vae" / "curve.jsonl", "a") as curve:
            curve.write('{"step": 40, "loss": 1.0}\n')
        train_tiny.log_curves(tracker, work, known)
    (run,) = told(folder)
    assert [line.get("vae/loss") for line in run.history] == [None, 2.0, 1.0]
    assert run.history[0]["clip/text/step"] == 20


class Broken:
    """A run whose service died after its first point."""

    step, job_type, id = 0, "main", "x"

    def __init__(self) -> None:
        self.points: list[dict] = []
        self.closed: list[int] = []

    def log(self, data, **_):
        if self.points:
            raise ConnectionResetError("Connection lost")
        self.points.append(data)

    def finish(self, exit_code):
        self.closed.append(exit_code)


def test_a_failure_in_mid_run_costs_no_sample(command, tmp_path, monkeypatch):
    """Mutants: the error ends the run, it is told for every sample, points are sent after it, no record."""
    run = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    code, printed = command("cache=uniform", "bench=fidelity", OFFLINE)
    assert code == 0 and printed.count("W&B stopped (ConnectionResetError: Connection lost)") == 1
    (folder,) = folders(tmp_path)
    assert (folder / "per_prompt.jsonl").read_text().count("\n") == 3 and (folder / "record.json").is_file()
    assert len(run.points) == 1 and run.closed == [1]


def test_a_run_offline_that_does_not_start_is_left_out(tracked, monkeypatch, capsys):
    """Mutants: the run ends; or, online, it goes on in silence without what was asked for."""
    cfg, folder = tracked
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no service\nat all")))
    with tracking.start(cfg, folder) as tracker:
        tracker.log({"psnr_db": 1.0})
    assert "W&B did not start (no service): this run goes on without it" in capsys.readouterr().out
    cfg.wandb.mode = "online"
    with pytest.raises(tracking.ErtaError, match="no service.\nwandb.mode=offline needs"), tracking.start(cfg, folder):
        pass


def test_online_is_looked_at_before_anything_is_loaded(command, tmp_path, monkeypatch):
    """Mutants: the model loaded first; a message that does not say what to do."""
    loaded = []
    monkeypatch.setattr(load, "load_pipeline", lambda *_: loaded.append(1))

    def refuse():
        raise RecordError("the W&B server https://w does not answer")

    monkeypatch.setattr(tracking, "check_access", refuse)
    code, printed = command("wandb.mode=online")
    assert code == 1 and "https://w does not answer.\nwandb.mode=offline needs neither" in printed
    assert not loaded and not folders(tmp_path)


@pytest.mark.slow
def test_a_sweep_is_a_group(command, tmp_path):
    """Mutants: the runs of a sweep among all others of their experiment."""
    code, printed = command("-m", "cache=uniform", "bench=fidelity", "bench.num_prompts=1", "cache.steps=3,2", OFFLINE)
    assert code == 0, printed
    (sweep,) = tmp_path.glob("outputs/*/*_sweep")
    wandb.teardown()
    files = wandb_runs.find_files(sweep)
    assert len(files) == 2 and all(
        f"main, {sweep.parent.name}/{sweep.name}".encode() in file.read_bytes() for file in files
    )
    frame = load_runs(sweep)
    assert frame["cache.steps"].tolist() == [3, 2] and frame["computed"].tolist() == [3, 2]
