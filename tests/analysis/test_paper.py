"""What the paper prints, and how figures decide their claims."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from analysis import figures, paper, records, tables, verdicts
from analysis.records import FigureRecord, Measured, Table
from tests.analysis import tables as made_up

SERIES = {
    "regimes": {"cells": {
        "A helps": {"guidance 1, 25 steps": [1.0, 2.0, 1.5], "guidance 9, 25 steps": [-1.0, -2.0, -1.5]},
        "B helps": {"guidance 9, 25 steps": [-1.0, 2.0, 0.5]},
    }},
    "realism": {
        "fewer": {"1/2": [20.0, 30.0], "1/3": [15.0, 25.0]},
        "growth": {kind: {key: [0.5, 2.0] for key in ("0", "1/4", "1/2", "3/4")} for kind in ("random", "along")},
        "order": {"slow": {"A": {"printed": 20.0, "psnr_db": [30.0]}, "B": {"printed": 25.0, "psnr_db": [28.0]}}},
        "printed_fewer": {"psnr_db": 15.9, "speedup": 1.9},
    },
    "solver_tables": {"solvers": {
        "Euler": {"nodes": [0, 2], "sigmas": [1.0, 0.5, 0.0], "velocity": [[-0.5], [-0.5]], "latent": [[0.0], [0.0]]},
        "fitted": {"nodes": [0, 1], "sigmas": [1.0, 0.8, 0.0], "velocity": [[-0.2, 0.0], [-0.9, 0.1]], "latent": [[0.1, 0.0], [0.1, 0.2]]},
    }},
    "solver_limits": {"conditions": {
        "as calibrated": {"psnr_db": [40.0, 50.0], "matched": [40.0, 50.0], "flips": 0.0, "prompts": ["a", "b"]},
        "elsewhere": {"psnr_db": [20.0, 30.0], "matched": [40.0, 50.0], "flips": 0.5, "prompts": ["a", "b"]},
    }, "predicted": None, "moved": [30.0, 31.0]},
    "fig2a_error_profile": {
        "true": [[0.1, 0.2, 0.3], [0.1, 0.3, 0.3]], "predicted": [[0.2, 0.2, 0.2]] * 2, "profile": [0.1, 0.2, 0.3],
    },
    "fig2b_trajectory_drift": {"drift": {"fixed": [[0.1, 0.2]] * 3, "adjusted": [[0.1, 0.1]] * 3}},
    "fig6_channel_errors": {"static": [[1.0, 2.0]] * 4, "dynamic": [[1.0, 3.0]] * 4, "motion": [0.1] * 8},
    "long_video": {"sizes": [{"frames": 9, "height": 64, "width": 64, "speedups": [1.9, 2.0], "possible": 2.0}]},
}  # fmt: skip


def record(name: str, values: list[float]) -> FigureRecord:
    claim = Measured(text="it helps", paper="it does", ours="1 against 2", values=values, unit="dB")
    return FigureRecord(
        command="python run.py", git_commit="abc", versions={}, device="CPU", config={"model": {"name": "tiny"}},
        config_hash="0", prompts=["a circle"] * len(values), seeds=list(range(len(values))), experiment=name,
        series=SERIES[name], claims=[claim],
    )  # fmt: skip


def test_every_printed_table_is_whole():
    """Each row has a method of ours or says why not; what is printed lies in its range. Mutant: a percent for a share."""
    for name in ("table1_video", "table2_image"):
        for block in paper.table(name).blocks:
            levels = {row.level for row in block.rows if row.method == "ertacache"}
            assert levels, block.title
            for row in block.rows:
                assert (row.method is None) == (row.why is not None), row
                found = row.numbers()
                assert 1 <= found["speedup"] < 5 and 10 < found["psnr_db"] < 40 and 0 < found["ssim"] < 1, row
                assert row.computed_steps is None or row.computed_steps < block.steps
    (wan,) = [block for block in paper.table("table1_video").blocks if block.model == "wan21"]
    numbers = {row.title: row.psnr_db for row in wan.rows}
    assert numbers["ERTACache"] == 23.77 and numbers["TeaCache"] == 16.17
    assert [row.why for row in wan.rows if row.title == "ProfilingDiT"] == [
        "not run here: its method is not part of this project"
    ]


def test_a_key_that_does_not_exist_is_refused(monkeypatch):
    block = {
        "printed": "x",
        "title": "x",
        "steps": 5,
        "rows": [{"title": "a", "level": "slow", "speedup": 2, "psrn": 3}],
    }
    monkeypatch.setattr(paper, "data", lambda: {"t": {"title": "t", "source": "s", "blocks": [block]}})
    with pytest.raises(ValueError, match="psrn"):
        paper.table("t")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 1.1, 0.9], verdicts.REPRODUCED),
        ([-1.0, -1.1, -0.9], verdicts.CONTRADICTED),
        ([1.0, -1.0, 0.0], verdicts.OPEN),
        ([], verdicts.OPEN),
    ],
)
def test_values_decide_a_figures_claim(values, said):
    """Mutants: the sign, the mean instead of the interval."""
    (found,) = verdicts.results(record("fig2b_trajectory_drift", values))
    assert found.verdict == said and found.paper == "it does"
    assert found.delta.startswith(f"{np.mean(values):+.3g} [") if values else found.delta == ""


@pytest.mark.parametrize("name", SERIES)
def test_figures_are_drawn_from_a_kept_record_alone(name, tmp_path):
    """Kept and read again, the same table and a figure that is not empty."""
    assert set(SERIES) == set(figures.OF_FIGURES)
    path = tmp_path / "kept.json.gz"
    records.write_record(record(name, [1.0, 2.0]), path)
    made = records.read_table(path)
    (table, figure) = tables.write_figure(tmp_path, made)
    assert "| it helps | it does | 1 against 2 | +1.5 [" in table.read_text() and figure.stat().st_size > 8000
    assert figure.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_side_by_side_draws_whatever_a_prompt_says(tmp_path):
    """Half a surrogate pair, and what looks like mathematics. Mutant: the prompt given to the figure as it is."""
    rows = made_up.table(
        [(made_up.row("ertacache"), [made_up.one(30.0)])],
        prompts=["a \ud800 circle $\\foo$"],
        table=Table(reference="ertacache", columns=["psnr_db"], figures=["side_by_side"]),
    )
    for key in (records.UNCACHED, "ertacache (3)"):
        place = tmp_path / figures.SAMPLES / figures.slug(key)
        place.mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(place / "000.webp")
    (made,) = figures.of_rows(rows, tmp_path)
    assert made.stat().st_size > 3000
