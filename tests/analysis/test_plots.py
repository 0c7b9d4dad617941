"""What the figures of a run, a comparison and a decomposition show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from analysis import plots
from analysis.plots import GROUPS, Point


def made(title: str, psnr_db: float, speedup: float | None = None, **changed) -> Point:
    known = {"group": "planned", "budget": 25, "low": psnr_db - 1, "high": psnr_db + 2, "is_reference": False}
    return Point(title=title, psnr_db=psnr_db, speedup=speedup, **(known | changed))


def write_samples(folder: Path, uncached: list[np.ndarray], cached: list[np.ndarray]) -> list[dict]:
    """Lossless WebP files of clips (frames, height, width, 3), as a run leaves them, and the rows of their prompts."""
    for arm, clips in (("uncached", uncached), ("cached", cached)):
        (folder / arm).mkdir()
        for index, clip in enumerate(clips):
            first, *others = [Image.fromarray(frame) for frame in clip]
            first.save(folder / arm / f"{index:03d}.webp", save_all=True, append_images=others, lossless=True)
    return [{"index": index, "prompt": f"prompt {index}"} for index in range(len(uncached))]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape, np.uint8)


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
    assert plots.front([fast, *beaten, middle, twin, slow]) == [slow, middle, fast, twin]
    assert plots.front([made("untimed", 99)]) == [] and plots.front([beaten[2]]) == [beaten[2]]


def test_rows_of_the_dot_plot():
    """Mutants: one order for all panels, the worst on top, the smallest budget first, a row for what is missing."""
    points = [made("a", 30), made("c", 50), made("b", 40), made("b", 25, budget=12), made("a", 28, budget=12)]
    larger, smaller = plots.dot_plot_figure(points, 50).axes
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
    figure = plots.dot_plot_figure([ours, made("better", 50, group="none"), made("best", 60, group="none")], 50)
    (panel,) = figure.axes
    interval, dot = (line for line in panel.lines if list(line.get_ydata()) in ([2, 2], [2]))
    assert list(interval.get_xdata()) == [39, 42] and list(dot.get_xdata()) == [40]
    assert (dot.get_marker(), dot.get_color()) == (GROUPS["online"].marker, GROUPS["online"].colour)
    assert [label.get_fontweight() for label in panel.get_yticklabels()] == ["normal", "normal", "bold"]
    (band,) = panel.patches
    assert (band.get_y(), band.get_height()) == (1.5, 1)
    assert [list(line.get_xdata()) for line in panel.lines if list(line.get_ydata()) == [0, 1]] == [[40, 40]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [GROUPS["online"].text, GROUPS["none"].text]


def test_groups_differ_without_colour():
    """Mutants: a marker or a colour used twice."""
    assert list(GROUPS) == ["planned", "online", "inside", "none"]
    assert len({group.marker for group in GROUPS.values()}) == len({group.colour for group in GROUPS.values()}) == 4


def test_pareto_draws_all_that_was_timed_and_names_the_front_and_the_reference():
    """Mutants: every point named, the reference only if on the front, untimed rows at zero, a slanted front, budgets
    of one size."""
    points = [made("slow", 60, 1.5), made("fast", 30, 3.0, budget=12), made("beaten", 25, 1.2)]
    points += [made("ours", 40, 1.4, is_reference=True), made("not timed", 99, is_reference=True)]
    (axis,) = plots.pareto_figure(points).axes
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
    figure = plots.pareto_figure(points)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert len(boxes) == 7 and [box.count_overlaps(boxes) for box in boxes] == [1] * 7  # each with itself
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)


@pytest.mark.parametrize("draw", [lambda points, path: plots.dot_plot(points, 50, path), plots.pareto])
@pytest.mark.parametrize("points", [[], [made("only", 40, 2.0, is_reference=True)]])
def test_figures_of_few_rows_are_900_px_or_wider(draw, points, tmp_path):
    """Mutants: no row or one row cannot be drawn, a figure too coarse for the page."""
    draw(points, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1440


@pytest.mark.parametrize(
    "values, factor",
    [
        ([25, 3], 10),
        ([26, 3], 5),
        ([1], 50),
        ([200], 1),
        ([0], 1),
        ([100, 100] + [0] * 10_000, 2),
        ([5] * 199 + [255], 50),
        ([5] * 197 + [255] * 3, 1),
    ],
)
def test_amplification_by_hand(values, factor):
    """Mutants: pixels that do not differ counted, the mean or the maximum as the measure, a factor that saturates, no
    smallest factor."""
    assert plots.amplification([np.array(values).reshape(1, 1, -1), np.zeros((1, 2, 2), int)]) == factor


def test_difference_is_absolute_and_by_pixel():
    """Mutants: differences in uint8 wrap around, the mean over channels, the sign kept."""
    uncached, cached = np.full((1, 2, 2, 3), 100, np.uint8), np.full((1, 2, 2, 3), 100, np.uint8)
    cached[0, 0, 1], cached[0, 1, 0] = (100, 90, 103), (100, 100, 250)
    np.testing.assert_array_equal(plots.difference(uncached, cached), [[[0, 10], [150, 0]]])


def test_contact_sheet_of_clips(tmp_path):
    """Mutants: a factor for each prompt, the difference of other frames, a difference where clips agree, an identical
    pair without its word, the amplified values wrapping around."""
    uncached = [noise(5, 48, 48, 3)] * 2
    changed = uncached[0].copy()
    changed[2, 10:20, 5:25] += 20  # the middle frame
    changed[2, 0, 0] += 40
    figure = plots.contact_sheet_figure(tmp_path, write_samples(tmp_path, uncached, [changed, uncached[1]]))
    assert figure.get_suptitle().endswith("uncached, cached, and their absolute difference × 10")
    first, second = figure.axes[:2]
    gap = 2
    sheet = first.images[0].get_array()
    assert sheet.shape == (3 * 48 + 2 * gap, 3 * 48, 3)
    np.testing.assert_array_equal(sheet[:48], np.concatenate(list(uncached[0][[0, 2, 4]]), axis=1))
    np.testing.assert_array_equal(sheet[48 + gap :][:48], np.concatenate(list(changed[[0, 2, 4]]), axis=1))
    expected = np.zeros((48, 3 * 48, 3), int)
    expected[10:20, 48 + 5 : 48 + 25], expected[0, 48] = 200, 255
    np.testing.assert_array_equal(sheet[-48:], expected)
    assert not second.images[0].get_array()[-48:].any()
    assert [[text.get_text() for text in axis.texts] for axis in (first, second)] == [[], ["identical"]]
    assert [axis.get_title() for axis in (first, second)] == ["prompt 0", "prompt 1"]


def test_contact_sheet_of_images(tmp_path):
    """Mutants: images below each other, more rows than the sheet holds, large ones as small as small ones."""
    images = [noise(1, 48, 240, 3)] * (plots.SHEET_ROWS + 1)
    figure = plots.contact_sheet_figure(tmp_path, write_samples(tmp_path, images, images))
    assert figure.get_suptitle() == "from the left: uncached, cached, and their absolute difference × 1"
    assert len(figure.axes) == plots.SHEET_ROWS and figure.axes[0].get_gridspec().ncols == 2
    assert figure.axes[0].images[0].get_array().shape == (48, 3 * 240 + 2 * 10, 3)


def test_growth_by_hand():
    """Mutants: the mean for the median, quartiles swapped, the statistics of all steps together, a linear axis."""
    growth = {0: [0.1, 0.5, 0.2, 0.4, 0.9], 7: [2.0]}
    wanted = {"smallest": [0.1, 2], "median over prompts and directions": [0.4, 2], "largest": [0.9, 2]}
    np.testing.assert_allclose(plots.growth_quartiles(growth), [[0.1, 2], [0.2, 2], [0.4, 2], [0.5, 2], [0.9, 2]])
    parts = {"injected": np.linspace(0, 0.1, 8), "propagated": np.linspace(0, 0.1, 8)}
    _, bottom = plots.decomposition_figure(parts, growth).axes
    drawn = {line.get_label(): line.get_ydata() for line in bottom.lines}
    assert {label: list(drawn[label]) for label in wanted} == wanted and bottom.get_yscale() == "log"
    assert list(drawn["neither grown nor shrunk"]) == [1, 1]
    band = bottom.collections[0].get_paths()[0].vertices
    assert (band[band[:, 0] == 0, 1].min(), band[band[:, 0] == 0, 1].max()) == (0.2, 0.5)
    assert {text.get_text() for text in bottom.get_legend().get_texts()} == {*drawn, "middle half"}
