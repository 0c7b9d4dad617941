"""Figures over runs, and the comparison of decompositions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import decomposition, records, run_plots
from analysis.row_plots import Point
from analysis.run_plots import PARTS, Split
from analysis.runs import FACTS, METRICS

EARLIER = Path(__file__).parent / "earlier"


def frame(*rows: dict) -> pd.DataFrame:
    common = {"model": "tiny", "steps": 50, "state": "finished", "cache": "x", "group": "online", "site": "output"}
    return pd.DataFrame([{**common, **row} for row in rows], columns=["folder", *FACTS, *METRICS])


def point(title: str, budget: int, psnr_db: float, **changed) -> Point:
    known = {
        "group": "planned",
        "low": psnr_db - 1,
        "high": psnr_db + 2,
        "speedup": None,
        "is_reference": title == "ours",
    }
    return Point(title=title, budget=budget, psnr_db=psnr_db, **(known | changed))


def test_points_of_a_frame():
    """Mutants: rows without a budget drawn at zero, no interval taken for one of no width elsewhere, a group that is not known
    stops everything, two sites under one name."""
    rows = frame(
        {
            "title": "ERTACache",
            "computed": 25,
            "psnr_db": 50.0,
            "psnr_low": 49.0,
            "psnr_high": 52.0,
            "speedup_denoise": 1.9,
        },
        {"cache": "old", "computed": 12, "psnr_db": 40.0, "group": "strange", "site": "blocks"},
        {"title": "uncached, again", "psnr_db": 99.0},
        {"title": "identical", "computed": 50},
    )
    ours, old = run_plots.points(rows)
    assert ours == Point("ERTACache, output", "online", 25, 50.0, 49.0, 52.0, 1.9, True)
    assert old == Point("old, blocks", "planned", 12, 40.0, 40.0, 40.0, None, False)


def test_psnr_by_budget_names_the_reference_and_the_best():
    """Mutants: the reference left out as it is worst, a method of one budget before those of all, the mean of all runs as a
    dot, an interval with its ends swapped, grey lines in the legend one by one."""
    found = [point(f"m{k}", budget, 40.0 + k + budget) for k in range(9) for budget in (25, 12)]
    found += [point("ours", 25, 30.0), point("ours", 25, 34.0), point("ours", 12, 20.0), point("once", 25, 99.0)]
    figure = run_plots.psnr_by_budget_figure(found, 50)
    (axis,) = figure.axes
    (legend,) = figure.legends
    wanted = ["m8", "m7", "m6", "m5", "m4", "m3", "ours", "4 more methods"]
    assert [text.get_text() for text in legend.get_texts()] == wanted
    assert axis.get_xticks().tolist() == [12, 25]
    (thick,) = (line for line in axis.lines if line.get_linewidth() == 2.4)
    assert thick.get_ydata().tolist() == [20.0, 32.0] and np.allclose(np.diff(thick.get_xdata()), 13)
    dots = next(one for one in axis.containers if one.lines[0].get_color() == thick.get_color())
    assert dots.lines[0].get_ydata().tolist() == [30.0, 34.0, 20.0]
    ends = [segment[:, 1].tolist() for segment in dots.lines[2][0].get_segments()]
    assert ends == [[29.0, 32.0], [33.0, 36.0], [19.0, 22.0]]
    looks = {(line.get_marker(), line.get_linestyle()) for line in axis.lines if line.get_label() in wanted[:7]}
    assert len(looks) == 7, "told apart without colour"


def test_measured_and_possible_speedups():
    """Mutants: the axes swapped, runs of one method under several names."""
    rows = [{"title": "a", "speedup_denoise": 1.5, "speedup_possible": 2.0}] * 2
    rows += [{"title": "b", "speedup_denoise": 1.0, "speedup_possible": 3.0}]
    (axis,) = run_plots.speedup_figure(frame(*rows)).axes
    _, first, second = axis.lines
    assert first.get_xydata().tolist() == [[2.0, 1.5]] * 2 and second.get_xydata().tolist() == [[3.0, 1.0]]
    assert [line.get_label() for line in axis.lines] == ["all of it", "tiny, a", "tiny, b"]


SHARES = {"injected": 0.2, "propagated": 1.1, "grid": -0.3}


def test_decompositions_by_hand():
    """Mutants: a part in another's place, negative shares stacked onto positive ones, computed steps shaded, no hatching."""
    by_step = {"injected": [0.0, 0.2, -0.1], "propagated": [0.5, 0.3, -0.2]}
    figure = run_plots.decompositions_figure([Split("a", SHARES, by_step, [1, 0, 1]), Split("b", SHARES)])
    left, right, _, empty = figure.axes
    assert [bar.get_width() for bar in left.patches] == list(SHARES.values())
    assert {text.get_text() for text in left.texts} == {"+20%", "+110%", "-30%"}
    assert len({bar.get_hatch() for bar in left.patches}) == 3
    shaded, *bars = right.patches
    assert (shaded.get_x(), shaded.get_width()) == (0.5, 1.0)
    stacked = [(bar.get_y(), bar.get_height()) for bar in bars]
    assert np.allclose(stacked, [(0, 0), (0, 0.2), (0, -0.1), (0, 0.5), (0.2, 0.3), (-0.1, -0.2)])
    assert not empty.patches and left.get_yticklabels()[0].get_text() == "a"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(PARTS)


@pytest.mark.slow
def test_every_figure_is_a_png_and_a_pdf(tmp_path):
    """Mutants: models in one figure, a figure of nothing, one of many budgets with a panel each."""
    rows = [
        {"model": model, "title": title, "computed": budget, "psnr_db": 30.0, "speedup_denoise": 2.0, "speedup_possible": 2.0}
        for model in ("a", "b") for title in ("x", "y") for budget in (25, 12)
    ]  # fmt: skip
    rows += [{"model": "b", "title": "x", "computed": k, "psnr_db": 20.0} for k in range(1, 9)]
    made = run_plots.draw(frame(*rows, {"title": "x", "run": "d", "computed": 25, **SHARES}), tmp_path / "figures")
    names = ["psnr_by_budget_a", "methods_a", "pareto_a", "psnr_by_budget_b", "pareto_b", "speedup", "decompositions"]
    assert [path.name for path in made] == [f"{name}.{form}" for name in names for form in ("png", "pdf")]
    for path in made:
        if path.suffix == ".pdf":
            assert path.read_bytes().startswith(b"%PDF")
        else:
            with Image.open(path) as image:
                assert image.width == 1440
    assert run_plots.draw(frame(), tmp_path / "none") == []


def run_of(folder: Path, method: str, mask: list[int], injected: float) -> Path:
    """A finished decomposition."""
    data = records.to_json(records.read(EARLIER / "decomposition"))
    data["config"]["cache"]["name"] = method
    step = [injected / len(mask)] * len(mask)
    shares = {"injected": injected, "propagated": 1 - injected, "grid": 0.0}
    made = {"shares": shares, "by_step": {"injected": step, "propagated": step}, "mask": mask, "total_norm": 3.25}
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({**data, **made}))
    return folder


@pytest.mark.slow
def test_decompositions_of_several_runs_are_compared(tmp_path, capsys, monkeypatch):
    """Mutants: the order of the files, budgets under one name, a folder that is none stops the others, exit code 0."""
    runs = [run_of(tmp_path / "a", "policy", [1, 0, 0], 0.4), run_of(tmp_path / "b", "ertacache", [1, 0, 1], 0.3)]
    runs += [run_of(tmp_path / "c", "policy", [1, 0, 1], 0.2)]
    shutil.copytree(EARLIER / "decomposition", tmp_path / "old")
    drawn: list[Split] = []
    figure = run_plots.decompositions_figure
    monkeypatch.setattr(run_plots, "decompositions_figure", lambda splits: drawn.extend(splits) or figure(splits))
    assert decomposition.main([*map(str, runs), str(tmp_path / "old"), "--out", str(tmp_path / "out")]) == 0
    assert [one.title.split("\n")[:2] for one in drawn] == [
        ["policy", "2 of 6 steps"], ["policy", "1 of 6 steps"], ["ertacache", "2 of 6 steps"], ["ertacache", "old"],
    ]  # fmt: skip
    assert drawn[1].shares["injected"] == 0.4 and drawn[0].title.endswith("error norm 3.25")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"decompositions.png", "decompositions.pdf"}
    capsys.readouterr()
    assert decomposition.main([str(runs[0]), str(EARLIER / "main"), str(runs[1])]) == 1
    printed = capsys.readouterr()
    assert "holds a record of the kind 'main'" in printed.err and (tmp_path / "decompositions.png").is_file()
    assert decomposition.main([str(tmp_path / "nowhere")]) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_one_run_is_not_compared(tmp_path, count):
    runs = [run_of(tmp_path / name, name, [1, 0, 1], 0.3) for name in "ab"[:count]]
    assert decomposition.main([str(run) for run in runs]) == 0
    assert (tmp_path / "decompositions.pdf").is_file() == (count == 2)
