"""Sweeps as tables and plots, from folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from analysis import records, sweep_plot, sweeps
from analysis.intervals import paired_interval
from analysis.records import MainRecord, Memory, RecordError, Steps, Timing
from tests.analysis.tables import one, row, table

PSNR = {25: [50.0, 54.0, 61.0], 17: [40.0, 44.0, 43.0], 12: [30.0, None, 33.0]}


def main_record(computed: int, psnr: list[float | None]) -> MainRecord:
    known = [value for value in psnr if value is not None]
    timing = {name: 1.0 for name in Timing.__dataclass_fields__} | {"forwards": 2 * computed, "repeats": 3}
    return MainRecord(
        **{"command": "python run.py", "git_commit": "abc", "versions": {}, "device": "CPU", "config_hash": "0"},
        config={"model": {"name": "tiny"}},
        prompts=["a circle"] * len(psnr),
        seeds=list(range(len(psnr))),
        steps=Steps(total=50, computed=computed, mask=[1] * 50, uncached=50),
        sigmas=[1.0, 0.0],
        timing=Timing(**timing),
        memory=Memory(cache_bytes=8, cache_dtype="float32", peak_bytes=8),
        metrics={
            "psnr_db": float(np.mean(known)) if known else None,
            "ssim": 0.98765,
            "speedup_denoise": 48 / computed,
            "speedup_possible": 50 / computed,
            "scene_accuracy": {"all": 2 / 3},
        },
        missing={},
        plan_report={},
    )


def member(folder: Path, number: int, overrides: list[str], state: str = "finished", error: str | None = None) -> Path:
    """Its entry in the sweep, and its folder."""
    (folder / "members").mkdir(parents=True, exist_ok=True)
    about = {"number": number, "overrides": overrides, "folder": f"{number}_run", "state": state, "error": error}
    (folder / "members" / f"{number}.json").write_text(json.dumps(about))
    (folder / f"{number}_run").mkdir()
    return folder / f"{number}_run"


def finished(folder: Path, number: int, overrides: list[str], computed: int, psnr: Any = None) -> None:
    made, psnr = member(folder, number, overrides), psnr or PSNR[computed]
    (made / "record.json").write_text(json.dumps(records.to_json(main_record(computed, psnr))))
    lines = [json.dumps({"index": index, "psnr_db": value}) for index, value in enumerate(psnr)]
    (made / "per_prompt.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def steps(tmp_path) -> Path:
    """A sweep over the steps, its third run failed, its tenth started; numbers, not names, decide the order."""
    fixed = ["bench=fidelity"]
    finished(tmp_path, 0, [*fixed, "cache.steps=25"], 25)
    finished(tmp_path, 1, [*fixed, "cache.steps=12"], 12)
    member(tmp_path, 2, [*fixed, "cache.steps=60"], "failed", "cache.steps=60 must lie between 1 and 50")
    member(tmp_path, 10, [*fixed, "cache.steps=3"], "started")
    return tmp_path


def test_table_of_a_sweep(steps):
    """Swept keys alone are columns. Mutants: members sorted by name; the interval of all metrics but PSNR's."""
    sweep = sweeps.load(steps)
    assert sweep.keys == ["cache.steps"] and sweep.fixed == ["bench=fidelity"]
    headings, lines = sweeps.cells(sweep)
    assert headings == [
        *("cache.steps", "computed", "forwards", "speed-up", "possible"),
        *("PSNR dB [95 %]", "median", "worst", "SSIM", "scene right"),
    ]
    spread = paired_interval(np.array(PSNR[25]))
    psnr = f"55.00 [{spread.low:.2f}, {spread.high:.2f}]"
    assert lines[0] == ["25", "25 of 50", "50", "1.92x", "2.00x", psnr, "54.00", "50.00", "0.9877", "67%"]
    assert lines[1][5:8] == ["31.50 [30.00, 33.00]", "31.50", "30.00"]  # the identical prompt has no PSNR
    assert [line[:3] for line in lines[2:]] == [["60", "failed", ""], ["3", "not finished", ""]]
    assert sweeps.remarks(sweep) == [
        "failed: cache.steps=60: cache.steps=60 must lie between 1 and 50",
        "not finished: cache.steps=3",
    ]


def test_files_of_a_sweep(steps, capsys):
    assert sweeps.main([str(steps)]) == 0
    printed = capsys.readouterr().out
    assert "sweep over cache.steps: 4 runs, tiny, 3 prompts" in printed and "failed: cache.steps=60" in printed
    text = (steps / "table.md").read_text()
    assert "`bench=fidelity`" in text and "(sweep.png)" in text and "- cache.steps=25: `0_run`" in text
    data = pd.read_csv(steps / "table.csv")
    assert data["cache.steps"].tolist() == [25, 12, 60, 3]
    assert data.psnr_db.tolist()[:2] == [55.0, 31.5] and "lpips" not in data
    assert data.error[2] == "cache.steps=60 must lie between 1 and 50"
    assert matplotlib.image.imread(steps / "sweep.png").shape[1] == 1440


def test_nearest_to_a_target(tmp_path):
    for number, computed in enumerate(PSNR):
        finished(tmp_path, number, [f"cache.threshold=0.1234567{number}", "sweep.target_psnr_db=45"], computed)
    sweep = sweeps.load(tmp_path)
    assert sweeps.remarks(sweep) == ["nearest to 45 dB: cache.threshold=0.12345671 (42.33 dB at 2.82x)"]
    assert [line[0] for line in sweeps.cells(sweep)[1]] == ["0.1235"] * 3
    (target,) = [one for one in plot(sweep).axes[0].lines if one.get_label() == "target, 45 dB"]
    assert set(target.get_ydata()) == {45}


def plot(sweep: sweeps.Sweep):
    return sweep_plot.figure(sweep.finished, sweep.keys, sweep.target_psnr_db)


def test_one_number_is_the_axis(tmp_path):
    """Against the number, in its order. Mutants: in the sweep's order; a mean drawn at the median."""
    for number, (value, computed) in enumerate(((0.5, 12), (0.04, 25), (0.1, 17))):
        finished(tmp_path, number, [f"cache.threshold={value}"], computed)
    top, bottom = plot(sweeps.load(tmp_path)).axes
    assert bottom.get_xlabel() == "cache.threshold" and bottom.get_xscale() == "log"
    mean, measured = top.containers[0].lines[0], bottom.lines[0]
    assert mean.get_xdata().tolist() == [0.04, 0.1, 0.5]
    np.testing.assert_allclose(mean.get_ydata().astype(float), [55, 127 / 3, 31.5])
    np.testing.assert_allclose(measured.get_ydata(), [48 / 25, 48 / 17, 4])
    assert [text.get_text() for text in bottom.texts] == ["25 steps", "17 steps", "12 steps"]
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == ["0.04", "0.1", "0.5"]


def test_several_keys_are_series_and_names(tmp_path):
    """The first key that is no number makes the lines; a seed is none. Mutant: the first key does."""
    runs = [(seed, cache, k) for k in (25, 17) for cache in ("ertacache", "meancache") for seed in (0, 1)]
    for number, (seed, cache, k) in enumerate(runs):
        finished(tmp_path, number, [f"cache.steps={k}", f"cache={cache}", f"seed={seed}"], k)
    sweep = sweeps.load(tmp_path)
    made = plot(sweep)
    axis = made.axes[0]
    assert [text.get_text() for text in made.legends[0].texts] == ["cache=ertacache", "cache=meancache"]
    assert axis.get_title("right") == "points: cache.steps, seed"
    assert sorted(text.get_text() for text in axis.texts) == sorted(2 * ["25 0", "25 1", "17 0", "17 1"])
    looks = {(group.lines[0].get_color(), group.lines[0].get_marker()) for group in axis.containers}
    assert len(looks) == 2 and len({marker for _, marker in looks}) == 2  # told apart in grey too
    seeds = sweep_plot.figure(sweep.finished, ["seed"])
    assert [text.get_text() for text in seeds.legends[0].texts] == ["seed=0", "seed=1"]


def test_other_experiments_have_a_headline(tmp_path):
    rows = table([(row("fora"), [one(40.0), one(44.0)]), (row("ertacache"), [one(41.0), one(45.0)])])
    folder = member(tmp_path, 0, ["seed=0"])
    (folder / "record.json").write_text(json.dumps(records.to_json(rows.record)))
    (folder / "rows.jsonl").write_text("".join(json.dumps(records.to_json(s)) + "\n" for s in rows.samples))
    member(tmp_path, 1, ["seed=1"])  # of an experiment that leaves no record
    finished(tmp_path, 2, ["seed=2"], 25)
    headings, lines = sweeps.cells(sweeps.load(tmp_path))
    assert headings == ["seed", "state", "result", "folder"]
    assert lines == [
        ["0", "finished", "2 of 2 rows; best Ertacache at 3 of 6: 43.00 dB", "0_run"],
        ["1", "finished", "", "1_run"],
        ["2", "finished", "55.00 dB at 1.92x", "2_run"],
    ]
    assert sweeps.draw(sweeps.load(tmp_path)) == (None, "no plot: only runs of experiment=main have PSNR and speed-up")


def test_a_run_that_cannot_be_read_counts_as_failed(steps):
    (steps / "1_run" / "per_prompt.jsonl").write_text('{"index": 0, "psnr')
    sweep = sweeps.load(steps)
    assert len(sweep.failed) == 2 and "per_prompt.jsonl cannot be read" in sweeps.remarks(sweep)[0]


def test_nothing_to_draw(tmp_path, capsys):
    """An old plot is not left beside a new table. All failed: exit code 1. Mutant: a plot of identical samples."""
    finished(tmp_path, 0, ["cache=none"], 25, psnr=[None, None])
    (tmp_path / "sweep.png").write_bytes(b"old")
    assert sweeps.main([str(tmp_path)]) == 0
    assert "no key was swept" in capsys.readouterr().out and not (tmp_path / "sweep.png").exists()
    finished(tmp_path, 1, ["cache=plan_grid"], 25, psnr=[None, None])
    assert sweeps.main([str(tmp_path)]) == 0 and "identical" in capsys.readouterr().out
    for number in (0, 1):
        about = {"number": number, "overrides": [f"seed={number}"], "folder": "x", "state": "failed", "error": "no"}
        (tmp_path / "members" / f"{number}.json").write_text(json.dumps(about))
    assert sweeps.main([str(tmp_path)]) == 1 and "no run is finished" in capsys.readouterr().out


def test_what_is_no_sweep(tmp_path, steps, capsys):
    (tmp_path / "file").write_text("")
    finished(tmp_path / "other", 0, [], 25)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "members").mkdir(parents=True)
    (tmp_path / "damaged" / "members" / "0.json").write_text("{}")
    expected = {
        "file": "is a file",
        "nowhere": "is not there",
        "empty": "holds no sweep",
        "other/0_run": "is the folder of one run",
        "damaged": "is damaged",
    }
    for name, reason in expected.items():
        with pytest.raises(RecordError, match=reason):
            sweeps.read_members(tmp_path / name)
    assert sweeps.main([str(tmp_path / "empty"), str(steps)]) == 1  # the others are done
    printed = capsys.readouterr()
    assert "holds no sweep" in printed.err and "sweep over cache.steps" in printed.out
