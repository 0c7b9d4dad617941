"""What the figures of a run, a comparison and a decomposition show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import plots


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
