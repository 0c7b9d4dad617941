"""Clips on disk: exact, or an error and no file."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.bench.vbench import runner
from experiments.output import clips
from tests.experiments.bench.vbench.test_runner import clip


def test_lossless_clips_come_back_exactly(tmp_path):
    import cv2

    frames = clip(3)
    path = tmp_path / "a.mp4"
    clips.write_lossless(frames, path, fps=16)
    capture, read = cv2.VideoCapture(str(path)), []
    assert capture.get(cv2.CAP_PROP_FPS) == 16
    while (pair := capture.read())[0]:
        read.append(pair[1][..., ::-1])
    np.testing.assert_array_equal(np.stack(read), clips.to_uint8(frames))


def test_a_clip_that_a_full_disk_cut_off_is_an_error_and_no_file(tmp_path, monkeypatch):
    """The encoder returns as if all were well; the file lacks its index, or a part of its last box."""
    import imageio.v2

    path, whole = tmp_path / "a.mp4", tmp_path / "whole.mp4"
    clips.write_lossless(clip(), whole)
    content = whole.read_bytes()
    moov = content.index(b"moov") - 4
    free = [1 << 30]
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free[0]}))
    for kept in (0, moov // 2, moov, len(content) - 1):
        monkeypatch.setattr(imageio.v2, "mimwrite", lambda to, *a, kept=kept, **k: to.write_bytes(content[:kept]))
        for free[0], message in ((1 << 30, "not written whole"), (0, "No space left")):
            with pytest.raises(OSError, match=message):
                clips.write_lossless(clip(), path)
            assert not path.exists()
    monkeypatch.setattr(imageio.v2, "mimwrite", lambda *a, **k: path.write_bytes(content))
    clips.write_lossless(clip(), path)
    assert path.read_bytes() == content
