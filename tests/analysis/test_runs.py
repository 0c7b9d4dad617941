"""One frame of runs: from records, W&B files and the W&B API alike, and as tables."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import wandb
from wandb.apis.public import Run as ApiRun

from analysis import records, runs, wandb_runs
from analysis.gallery import DATA
from analysis.intervals import paired_interval
from tests.analysis.tables import one, row, table

EARLIER = Path(__file__).parent / "earlier"
GROWTH = ("decomposition.growth_prompts=1", "decomposition.growth_directions=1")


class FakeApi:
    """Hands out the runs of W&B files as `wandb.Api` does those of a project. It has not been laid beside the server."""

    def __init__(self, folder: Path) -> None:
        self._runs = wandb_runs.read_files(wandb_runs.find_files(folder), pytest.fail)

    def runs(self, path=None, filters=None, order="+created_at", per_page=50, include_sweeps=False, lazy=True):
        assert path == "someone/ertacache"
        return [
            SimpleNamespace(
                id=run.id, name=run.name, state=run.state, config=run.config, summary_metrics=json.loads(json.dumps(run.summary)),
                scan_history=lambda run=run: iter(run.history),
            )
            for run in self._runs
        ]  # fmt: skip


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """The same rows, whatever their order and whether or not they know their folder."""
    keys = ["run", "row", "computed"]
    frames = [frame.drop(columns="folder").sort_values(keys).reset_index(drop=True) for frame in (left, right)]
    pd.testing.assert_frame_equal(*[frame.astype(object).where(frame.notna(), None) for frame in frames])


@pytest.mark.slow
def test_the_three_sources_agree(command, tmp_path):
    """One run of `main`, a table and a decomposition, read three ways. Mutants: a metric that one of them does not know, a row
    of a table lost, a configuration of another run, numbers as texts."""
    for name, arguments in {
        "a": ("cache=uniform", "bench=fidelity"),
        "b": (
            "experiment=compare",
            "compare.methods=[ertacache,t_gate]",
            "compare.quick=true",
            "compare.workers=1",
            "bench.num_prompts=2",
        ),
        "c": ("experiment=decomposition", "cache=policy", "bench.num_prompts=1", *GROWTH),
    }.items():
        code, printed = command(*arguments, "wandb.mode=offline", f"hydra.run.dir=outputs/{name}")
        assert code == 0, printed
    wandb.teardown()  # the service writes the last of a file after `finish` has returned
    by_record, by_file = runs.load_runs("outputs"), runs.load_runs(*(f"outputs/{name}/wandb" for name in "abc"))
    by_api = runs.load_runs("wandb:someone/ertacache", api=FakeApi(tmp_path))
    same(by_record, by_file)
    same(by_record, by_api)
    assert by_file["folder"].map(lambda path: Path(path).name).tolist() == by_file["run"].tolist()
    main, split = (by_record[by_record["run"] == name].iloc[0] for name in "ac")
    record = records.read(Path("outputs/a"))
    assert (main["psnr_db"], main["computed"], main["prompts"]) == (record.metrics["psnr_db"], 3, 3)
    lines = [json.loads(line) for line in Path("outputs/a/per_prompt.jsonl").read_text().splitlines()]
    interval = paired_interval(np.array([line["psnr_db"] for line in lines]))
    assert (main["psnr_low"], main["psnr_high"]) == (interval.low, interval.high)
    assert split["injected"] + split["propagated"] + split["grid"] == pytest.approx(1, abs=1e-3)
    assert (split["computed"], split["cache"]) == (3, "policy") and split["error_norm"] > 0
    rows = by_record[by_record["run"] == "b"]
    assert {*rows["cache"]} == {"none", "ertacache", "t_gate"} and {*rows["state"]} <= {"finished", "left out"}
    ours = rows[(rows["cache"] == "ertacache") & (rows["computed"] == 3)].iloc[0]
    assert ours["row"] == "ertacache (3)" and ours["title"] == "ERTACache" and ours["psnr_low"] <= ours["psnr_db"]
    assert ours["cache.steps"] == 3 and by_record["bench.num_prompts"].tolist().count(3) == 1
    clips = list(Path("outputs/b").glob("wandb/offline-run-*/files/media/videos/samples/*.gif"))
    assert len(clips) == 1, "the reference next to its uncached twin"


def test_the_fake_has_the_surface_of_the_api():
    """What is called and read exists in the installed wandb under the same names, with the same arguments."""
    theirs, ours = (inspect.signature(api.runs).parameters for api in (wandb.Api, FakeApi))
    assert {name: p.default for name, p in theirs.items()} == {name: p.default for name, p in ours.items()}
    for name in ("id", "name", "config", "summary_metrics", "state"):
        assert isinstance(inspect.getattr_static(ApiRun, name), property)
    assert all(p.default is not p.empty for p in [*inspect.signature(ApiRun.scan_history).parameters.values()][1:])


def write(folder: Path, config: dict, psnr_db: float, **changed) -> None:
    """A finished run of `main`."""
    data = records.to_json(records.read(EARLIER / "main"))
    data["metrics"]["psnr_db"] = psnr_db
    for key, value in config.items():
        *groups, last = key.split(".")
        place = data["config"]
        for group in groups:
            place = place[group]
        place[last] = value
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({**data, **changed}))


def test_settings_that_differ_are_columns(tmp_path):
    """Mutants: every setting a column; those of the harness's own; a setting that only one run has; a list lost."""
    write(tmp_path / "a", {"cache.threshold": 0.1, "cache.options": {"k": [1, 2]}, "seed": 0}, 30.0)
    write(
        tmp_path / "b",
        {"cache.threshold": 0.2, "cache.options": {"k": [1, 3]}, "seed": 4, "wandb.mode": "online"},
        31.0,
    )
    frame = runs.load_runs(tmp_path)
    added = [key for key in frame if key not in ("folder", *runs.FACTS, *runs.METRICS)]
    assert added == ["cache.options.k", "cache.threshold"] and frame["cache.options.k"].tolist() == ["[1, 2]", "[1, 3]"]
    assert frame["seed"].tolist() == [0, 4] and frame["budget"].tolist() == ["threshold=0.1", "threshold=0.2"]


def test_tables_in_every_format(tmp_path, capsys):
    """Mutants: rounded numbers in CSV, a pipe or an underscore that breaks a line, what is the same in all said in all."""
    write(tmp_path / "a_1", {"cache.name": "a|b"}, 30.123456)
    write(tmp_path / "b", {"cache.name": "c_d"}, 31.0)
    assert runs.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "30.12" in text and "model wan21_tiny" in text.splitlines()[0] and "wan21_tiny" not in text.split("\n", 1)[1]
    assert runs.main([str(tmp_path), "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 4 and len({*cells}) == 1 and r"a\|b" in lines[-2]
    assert runs.main([str(tmp_path), "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert r"\toprule" in latex and r"c\_d" in latex and r"a\_1" in latex and "30.12" in latex
    assert runs.main([str(tmp_path), "--format", "csv"]) == 0
    (tmp_path / "t.csv").write_text(capsys.readouterr().out)
    read = pd.read_csv(tmp_path / "t.csv")
    assert read["psnr_db"].tolist() == [30.123456, 31.0] and read["model"].tolist() == ["wan21_tiny"] * 2
    assert runs.main([str(tmp_path), "--format", "csv", "--columns", "run,psnr_db"]) == 0
    assert capsys.readouterr().out == "run,psnr_db\na_1,30.123456\nb,31.0\n"


def test_records_of_every_kind_and_version(tmp_path, capsys):
    """Mutants: kinds without PSNR dropped, a damaged record that stops everything, a table unfinished without a word."""
    shutil.copytree(EARLIER, tmp_path / "old")
    write(tmp_path / "cut", {}, 1.0)
    (tmp_path / "cut" / "record.json").write_text((tmp_path / "cut" / "record.json").read_text()[:200])
    rows = table([(row("ertacache"), [one(30.0), one(32.0)]), (row("fora"), [one(31.0)]), (row("t_gate"), [])],
                 left_out={"t_gate (3)": "no such modules"})  # fmt: skip
    records.write_bundle(rows, tmp_path / "kept.json.gz")
    frame = runs.load_runs(tmp_path)
    assert {*frame["kind"]} == {"main", "rows", "calibration", "speed", "model_card", "decomposition"}
    assert "passed over" in (said := capsys.readouterr().err) and "cut/record.json cannot be read" in said
    kept = frame[frame["run"] == "kept"].set_index("title")
    assert kept["state"].to_dict() == {"Ertacache": "finished", "Fora": "unfinished", "T_Gate": "left out"}
    assert kept.loc["Ertacache", "psnr_db"] == 31 and kept.loc["T_Gate", "reason"] == "no such modules"
    assert pd.isna(kept.loc["Fora", "psnr_db"]) and "1 of 2 samples" in kept.loc["Fora", "reason"]
    assert frame[frame["kind"] == "speed"]["speedup_denoise"].notna().all()
    assert {*frame[frame["kind"] == "model_card"]["site"]} == {"output", "blocks"}
    assert frame[frame["kind"] == "calibration"]["reuse_error"].notna().any()
    assert frame[(frame["kind"] == "main")]["experiment"].tolist() == ["main"]


def killed(folder: Path, name: str, config: dict, points: list[dict]) -> None:
    """W&B files of a run that told samples and no end: the exit record is cut off."""
    settings = wandb.Settings(disable_git=True, save_code=False, console="off", silent=True)
    run = wandb.init(mode="offline", project="p", name=name, dir=str(folder), config=config, settings=settings)
    for step, point in enumerate(points):
        run.log(point, step=step, commit=True)
    run.finish()
    wandb.teardown()
    path = folder / "wandb" / f"run-{run.id}.wandb"
    shutil.move(next(folder.glob(f"wandb/offline-run-*-{run.id}/*.wandb")), path)
    shutil.rmtree(next(folder.glob(f"wandb/offline-run-*-{run.id}")))
    path.write_bytes(path.read_bytes()[:-4])


def test_of_a_killed_run_the_samples_are_a_row(tmp_path, capsys):
    """Mutants: the run dropped, or taken for finished; rows of a table mixed; another project's run read."""
    config = {"experiment": {"name": "main"}, "model": {"name": "tiny"}, "cache": {"name": "uniform", "steps": 3}}
    sample = {"psnr_db": 30.0, "ssim": 0.9, "ms_ssim": 0.8, "cached/forwards": 6, "cached/scene": True}
    killed(tmp_path, "m", config, [sample, {**sample, "psnr_db": 32.0, "cached/scene": False}])
    in_rows = [
        {f"{key}/psnr_db": value, f"{key}/ssim": 1.0, f"{key}/forwards": 4}
        for key, value in (("a (3)", 20.0), ("b", 40.0))
    ]
    killed(tmp_path, "t", {**config, "experiment": {"name": "compare"}}, in_rows)
    killed(tmp_path, "other", {"lr": 0.1}, [{"loss": 1.0}])
    frame = runs.load_runs(tmp_path).set_index("run")
    said = capsys.readouterr().err
    assert "run other, is of another project" in said and said.count("ends in the middle of a record") == 3
    assert {*frame["state"]} == {"unfinished"} and {*frame.index} == {"m", "t"}
    main = frame.loc["m"]
    assert (main["psnr_db"], main["prompts"], main["forwards"], main["scene_accuracy"]) == (31.0, 2, 6, 0.5)
    assert main["psnr_low"] == 30 and main["budget"] == "steps=3"
    assert dict(zip(frame.loc["t"]["row"], frame.loc["t"]["psnr_db"], strict=True)) == {"a (3)": 20.0, "b": 40.0}


BAD = {
    "a folder that does not exist": (["nowhere"], "nowhere: no such file or folder"),
    "an empty folder": (["empty"], "empty holds no runs: neither records nor W&B files"),
    "nothing but a damaged record": (["damaged"], "damaged: no run has anything to show"),
    "no entity": (["wandb:project"], "wandb:project: give the entity and the project"),
    "an unknown column": (["good", "--columns", "psnr"], "there is no column psnr. Choose from folder, run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, monkeypatch, capsys):
    arguments, expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write(Path("good"), {}, 30.0)
    write(Path("damaged"), {}, 30.0)
    Path("damaged/record.json").write_text("{")
    assert runs.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith(f"error: {expected}")


def test_every_kept_record_is_read():
    """Tables, figures and decompositions of `analysis/data`. Mutant: files that are no tables passed over."""
    problems: list[str] = []
    frame = runs.load_runs(DATA, tell=problems.append)
    assert not problems and {"rows", "figure", "decomposition", "main"} <= set(frame["kind"])
