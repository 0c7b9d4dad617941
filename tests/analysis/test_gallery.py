"""A folder of records as headings, figures and verdicts."""

from __future__ import annotations

import json

import pytest

from analysis import gallery, records, verdicts
from analysis.records import Claim, DecompositionRecord, FigureRecord, Measured, Table
from tests.analysis.tables import COLUMNS, one, row, table

MADE = {
    "command": "python run.py experiment=x",
    "git_commit": "abc",
    "versions": {},
    "device": "CPU",
    "config": {"model": {"name": "tiny"}},
    "config_hash": "0",
    "prompts": ["a circle"],
    "seeds": [0],
}


def rows(**changes):
    claim = Claim(text="the cache is better", better="ertacache", worse="uniform")
    made = [(row("ertacache"), [one(30.0), one(33.0)]), (row("uniform"), [one(20.0), one(21.0)])]
    shown = Table(reference="ertacache", columns=COLUMNS, claims=[claim], figures=["methods"])
    return table(made, **{"table": shown, "experiment": "table1_video", **changes})


def figure() -> FigureRecord:
    claim = Measured(text="it drifts less", paper="less", ours="0.1 against 0.3", values=[0.2], unit="")
    series = {"drift": {"fixed": [[0.1, 0.2]], "adjusted": [[0.1, 0.1]]}}
    return FigureRecord(**MADE, experiment="fig2b_trajectory_drift", series=series, claims=[claim])


def decomposition() -> DecompositionRecord:
    by_step = {"injected": [0.0, 0.2], "propagated": [0.3, 0.5]}
    shares = {"injected": 0.2, "propagated": 0.8, "grid": 0.0}
    growth = {0: [0.5], 1: [1.0]}
    return DecompositionRecord(**MADE, shares=shares, by_step=by_step, open_loop_over_total=1.5, growth=growth)


def test_every_kind_in_a_folder_of_files(tmp_path):
    """Mutants: kinds left out, another order, figures of another record, verdicts by hand, rows that are not shown."""
    records.write_bundle(rows(), tmp_path / "c.json.gz")
    records.write_record(figure(), tmp_path / "b.json.gz")
    records.write_record(decomposition(), tmp_path / "a.json.gz")
    split, drift, first = gallery.of_folder(tmp_path)
    assert [split.title, drift.title, first.title] == [
        "Where the error comes from: tiny, 1 prompt", "Figure 2b, trajectory drift: tiny, 1 prompt", "Table 1, video: tiny, 2 prompts",
    ]  # fmt: skip
    assert split.results == [] and split.verdicts == "" and "<td>+20.0%</td>" in split.rows
    assert [line.get_label() for line in drift.figures[0].axes[0].lines] == ["fixed", "adjusted"]
    assert "the cached trajectory drifts" in drift.heading and "experiment=x" in drift.heading
    assert drift.results[0].verdict == verdicts.REPRODUCED and "| it drifts less | less |" in drift.verdicts
    assert [label.get_text() for label in first.figures[0].axes[0].get_yticklabels()] == ["Ertacache", "Uniform"]
    assert [result.delta for result in first.results] == ["PSNR dB +11.00 [+10.00, +12.00]"]
    assert "| the cache is better |" in first.verdicts and drift.rows == ""
    assert first.rows.startswith("<details><summary>All rows</summary>") and "<td>31.50</td>" in first.rows
    assert list(gallery.decompositions(tmp_path)) == ["a"]


def test_run_folders_below_a_folder(tmp_path, capsys):
    """Mutants: a damaged run ends all others, or is passed over in silence; runs of other kinds are errors."""
    made = rows()
    for name, record in {"one": made.record, "two": figure(), "broken": None}.items():
        (tmp_path / "all" / name).mkdir(parents=True)
        text = json.dumps(records.to_json(record)) if record else "{"
        (tmp_path / "all" / name / "record.json").write_text(text)
    lines = [json.dumps(records.to_json(sample)) for sample in made.samples]
    (tmp_path / "all" / "one" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    found = gallery.read_all(tmp_path)
    assert [path.name for path in found] == ["one", "two"]
    assert list(gallery.read_all(tmp_path / "all" / "two")) == [tmp_path / "all" / "two"]
    said = capsys.readouterr().err
    assert said.startswith("passed over: ") and "broken" in said and len(said.splitlines()) == 1


def test_a_relative_folder_is_looked_for_in_the_project(tmp_path, monkeypatch):
    """Notebooks run in their own folder. Mutant: only the working folder counts."""
    monkeypatch.chdir(tmp_path)
    assert gallery.read_all("analysis/data").keys() == gallery.read_all().keys()


@pytest.mark.parametrize(("make", "said"), [(False, "is not a folder"), (True, "holds no finished table")])
def test_no_folder_and_an_empty_one_are_one_line(tmp_path, make, said):
    if make:
        (tmp_path / "runs").mkdir()
    with pytest.raises(records.RecordError, match=said) as raised:
        gallery.read_all(tmp_path / "runs")
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value._render_traceback_() == [f"error: {raised.value}"]


def test_no_decomposition_says_what_makes_one(tmp_path):
    records.write_record(figure(), tmp_path / "b.json.gz")
    with pytest.raises(records.RecordError, match="experiment=decomposition makes one"):
        gallery.decompositions(tmp_path)


def test_whatever_is_committed_is_shown(capsys):
    """Every file of analysis/data. Mutant: a new kind of file there, which the notebook then leaves out."""
    files = sorted(path.name for path in gallery.DATA.glob("*.json.gz"))
    assert [path.name for path in gallery.read_all()] == files and capsys.readouterr().err == ""
