"""Films: every frame at its place, small clips at their own size, and pages that stay small."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from analysis.page import film
from tests.analysis.runs import write_clips


def still(uri: str) -> np.ndarray:
    """The pixels of a data URI, uint8."""
    kind, content = uri.split(";base64,")
    assert kind == "data:image/webp"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image.convert("RGB"))


def test_every_frame_lies_where_its_keyframe_looks():
    """7 frames of 32×16 in a grid; CSS puts `percent` of (picture - frame) to the left. Mutant: rows and columns swapped."""
    frames = np.random.default_rng(0).integers(0, 256, (7, 16, 32, 3)).astype(np.uint8)
    made = film.make_film(frames, frames)
    pixels = still(made.uncached)
    assert pixels.shape == (made.rows * 16, made.columns * 32, 3) and made.columns * made.rows >= 7
    for frame, (_, left, top) in zip(frames, made.keyframes, strict=True):
        x, y = round(left / 100 * (pixels.shape[1] - 32)), round(top / 100 * (pixels.shape[0] - 16))
        assert np.array_equal(pixels[y : y + 16, x : x + 32], frame)
    assert [time for time, _, _ in made.keyframes] == pytest.approx([100 * k / 7 for k in range(7)])
    assert made.seconds == pytest.approx(7 / 8)


def test_enlarged_clips_go_back_to_their_own_pixels():
    """Without loss, and both sides together: a flat one is not made smaller than its twin."""
    own = np.random.default_rng(1).integers(0, 256, (2, 33, 64, 3)).astype(np.uint8)
    made = film.make_film(own.repeat(2, 1).repeat(2, 2), np.zeros((2, 66, 128, 3), np.uint8))
    assert (made.width, made.height) == (64, 33)
    assert np.array_equal(still(made.uncached)[:33, :64], own[0]) and not still(made.cached).any()


def test_long_clips_show_fewer_frames_in_the_same_time():
    frames = np.arange(120, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    made = film.make_film(frames, frames)
    assert made.frames == film.MAX_FRAMES and made.seconds == 15
    shown = still(made.uncached)[8::16, 8::16, 0].ravel()[: made.frames]
    assert shown[0] == 0 and shown[-1] == 119 and set(np.diff(shown.astype(int))) == {2, 3}


def test_large_films_stay_inside_what_webp_can_hold():
    frames = np.zeros((49, 240, 416, 3), np.uint8)
    frames[:, ::2, ::3] = 255  # so that no pixel stands for four
    made = film.make_film(frames, frames)
    assert max(made.columns * 416, made.rows * 240) < 16_384 and (made.width, made.is_small) == (416, False)


def test_a_page_holds_only_so_many_bytes(tmp_path, monkeypatch):
    """The first pair always."""
    rows = write_clips(tmp_path, list("abc"), [40.0, 41.0, None])
    size = len(film.gallery(tmp_path, rows[:1], 9).pairs[0].film.uncached)
    monkeypatch.setattr(film, "MAX_BYTES", 4.5 * size)
    shown = film.gallery(tmp_path, rows, 9)
    assert len(shown.pairs) == 2 and shown.total == 3
    monkeypatch.setattr(film, "MAX_BYTES", 1)
    assert [pair.psnr for pair in film.gallery(tmp_path, rows, 9).pairs] == ["40.00 dB"]


def test_what_a_sample_lacks_is_said():
    assert film.what_is_wrong(None) == ""
    assert film.what_is_wrong({"shape": True, "all": True}) == "as asked"
    assert film.what_is_wrong({"shape": False, "colour": False, "all": False}) == "wrong: shape, colour"
    assert film.what_is_wrong({"shape": True, "all": False}) == "an object too many"
