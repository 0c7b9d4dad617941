"""Figures of a comparison's rows: the front, the order of rows, names that are kept apart."""

from __future__ import annotations

import pytest
from matplotlib.text import Text
from PIL import Image

from analysis import figures, row_plots
from analysis.row_plots import GROUPS, Point
from tests.analysis.tables import one, row, table


def made(title: str, psnr_db: float, speedup: float | None = None, **changed) -> Point:
    known = {"group": "planned", "budget": 25, "low": psnr_db - 1, "high": psnr_db + 2, "is_reference": False}
    return Point(title=title, psnr_db=psnr_db, speedup=speedup, **(known | changed))


def test_front_by_hand():
    """Mutants: strictly better in both needed to beat, one of two equal points left out, an untimed row kept, less
    speed-up is better, another order."""
    slow, middle, fast, twin = (
        made("slow", 60, 1.5),
        made("middle", 50, 2.0),
        made("fast", 30, 3.0),
        made("twin", 30, 3.0),
    )
    beaten = [made("as fast", 45, 2.0), made("as good", 50, 1.8), made("worse in both", 20, 1.0), made("untimed", 99)]
    assert row_plots.front([fast, *beaten, middle, twin, slow]) == [slow, middle, fast, twin]
    oracle = made("oracle", 70, 3.5, group="oracle")  # beats all of them, and counts as nothing; mutant: it counts
    assert row_plots.front([oracle, slow, middle]) == [slow, middle]
    assert row_plots.front([made("untimed", 99)]) == [] and row_plots.front([beaten[2]]) == [beaten[2]]


def test_rows_of_the_dot_plot():
    """Mutants: one order for all panels, the worst on top, the smallest budget first, a row for what is missing."""
    points = [made("a", 30), made("c", 50), made("b", 40), made("b", 25, budget=12), made("a", 28, budget=12)]
    larger, smaller = row_plots.dot_plot_figure(points, 50).axes
    assert [panel.get_title() for panel in (larger, smaller)] == [f"{k} of 50 steps computed" for k in (25, 12)]
    assert [label.get_text() for label in larger.get_yticklabels()] == ["c", "b", "a"]
    assert [label.get_text() for label in smaller.get_yticklabels()] == ["a", "b"]
    for panel, rows in ((larger, 3), (smaller, 2)):
        bottom, top = panel.get_ylim()
        assert top < 0 and rows - 1 < bottom < rows  # the first row on top, no empty one below


def test_a_row_of_the_dot_plot_and_the_reference():
    """Mutants: the interval around another row, its ends swapped for a width, colours by position, the band or line of
    another method, every name bold, groups in the legend that do not occur."""
    ours = made("ours", 40, group="online", is_reference=True)
    figure = row_plots.dot_plot_figure([ours, made("better", 50, group="none"), made("best", 60, group="none")], 50)
    (panel,) = figure.axes
    interval, dot = (line for line in panel.lines if list(line.get_ydata()) in ([2, 2], [2]))
    assert list(interval.get_xdata()) == [39, 42] and list(dot.get_xdata()) == [40]
    assert (dot.get_marker(), dot.get_color()) == (GROUPS["online"].marker, GROUPS["online"].colour)
    assert [label.get_fontweight() for label in panel.get_yticklabels()] == ["normal", "normal", "bold"]
    (band,) = panel.patches
    assert (band.get_y(), band.get_height()) == (1.5, 1)
    assert [list(line.get_xdata()) for line in panel.lines if list(line.get_ydata()) == [0, 1]] == [[40, 40]]
    known = made("known", 40, median=42.0, worst=20.0)
    (panel,), (spread,) = (one := row_plots.dot_plot_figure([known], 50)).axes, one.legends
    marks = {line.get_marker(): list(line.get_xdata()) for line in panel.lines}
    assert (
        marks["|"] == [42]
        and marks["x"] == [20]
        and [t.get_text() for t in spread.get_texts()][1:] == ["median", "worst sample"]
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [GROUPS["online"].text, GROUPS["none"].text]


def test_groups_differ_without_colour():
    """Mutants: a marker or a colour used twice."""
    assert list(GROUPS) == ["planned", "online", "inside", "none", "oracle"]
    assert len({group.marker for group in GROUPS.values()}) == len({group.colour for group in GROUPS.values()}) == 5


def test_pareto_draws_all_that_was_timed_and_names_the_front_and_the_reference():
    """Mutants: every point named, the reference only if on the front, untimed rows at zero, a slanted front, budgets
    of one size."""
    points = [made("slow", 60, 1.5), made("fast", 30, 3.0, budget=12), made("beaten", 25, 1.2)]
    points += [made("ours", 40, 1.4, is_reference=True), made("not timed", 99, is_reference=True)]
    (axis,) = row_plots.pareto_figure(points).axes
    assert sorted(text.get_text() for text in axis.texts) == ["fast", "ours", "slow"]
    assert [text.get_text() for text in axis.texts if text.get_fontweight() == "bold"] == ["ours"]
    steps, *markers = axis.lines
    assert steps.get_xydata().tolist() == [[1.5, 60], [1.5, 30], [3.0, 30]]
    assert [marker.get_xydata().tolist() for marker in markers] == [
        [[p.speedup, p.psnr_db]] for p in points if p.speedup
    ]
    sizes = {point.title: marker.get_markersize() for point, marker in zip(points[:3], markers, strict=False)}
    assert sizes["slow"] == sizes["beaten"] > sizes["fast"]


def test_names_are_kept_apart():
    """Mutants: every name at the first place, places that the last name took not remembered, names out of the panel."""
    points = [made(f"method {i}", 50 - i / 50, 2 + i / 500) for i in range(6)] + [made("far away", 10, 4.0)]
    figure = row_plots.pareto_figure(points)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 7 and [box.count_overlaps(boxes) for box in boxes] == [1] * 7  # each with itself
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)


@pytest.mark.parametrize("draw", [lambda points: row_plots.dot_plot_figure(points, 50), row_plots.pareto_figure])
@pytest.mark.parametrize("points", [[], [made("only", 40, 2.0, is_reference=True)]])
def test_figures_of_few_rows_are_900_px_or_wider(draw, points, tmp_path):
    """Mutants: no row or one row cannot be drawn, a figure too coarse for the page."""
    draw(points).savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1440


@pytest.mark.parametrize(("uncached_s", "drawn"), [(None, ["methods"]), (2.0, ["methods", "pareto"])])
def test_speed_ups_are_drawn_where_they_were_measured(uncached_s, drawn, tmp_path):
    """Mutant: axes without a point in them."""
    rows = table([(row(name, 3), [one(30.0, uncached_s=uncached_s)] * 4) for name in ("a", "b")])
    assert [name for name, _ in figures.methods(rows, tmp_path)] == drawn
