"""Clips and images on disk: lossless mp4 or png for benchmarks, lossy mp4 as people save it, WebP for pages."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from erta.errors import ErtaError

FRAME_MS = 125
MIN_SHOWN_PX = 128
MAX_SHOWN_PX = 416
FULL_DISK_BYTES = 1 << 16  # less free space than this is none
MP4_FPS = 16


def frames_of(source: str, frames: np.ndarray, path: Path) -> np.ndarray:
    """The frames that a metric sees: `frames` themselves (`decoded`), or read back from an mp4 written to `path`."""
    return frames if source == "decoded" else through_mp4(frames, path)


def through_mp4(frames: np.ndarray, path: Path) -> np.ndarray:
    """Frames as they come back from the file that diffusers' `export_to_video` writes (H.264, yuv420p, lossy).

    Args:
        frames: (frames, height, width, 3) in [0, 1].
        path: the file, which is kept.

    Returns the frames read from it, float32 multiples of 1/255. Raises ErtaError if the writer
    rescaled them: their sides must be multiples of 16.
    """
    import imageio.v2 as imageio  # type: ignore[import-untyped]
    from diffusers.utils import export_to_video

    path.parent.mkdir(parents=True, exist_ok=True)
    export_to_video(list(frames), str(path), fps=MP4_FPS)
    read = np.stack(imageio.mimread(path, memtest=False))
    if read.shape != frames.shape:
        raise ErtaError(f"{path} holds frames {read.shape}, not {frames.shape}: export_to_video rescaled them")
    return read.astype(np.float32) / 255


def write_animation(frames: np.ndarray, path: Path) -> None:
    """Frames in [0, 1] as an animated WebP: small clips enlarged and lossless, large ones reduced and lossy."""
    pixels = to_uint8(frames)
    factor = max(1, MIN_SHOWN_PX // pixels.shape[1])
    images = [Image.fromarray(frame.repeat(factor, axis=0).repeat(factor, axis=1)) for frame in pixels]
    small = images[0].width <= MAX_SHOWN_PX
    for image in images:
        image.thumbnail((MAX_SHOWN_PX, MAX_SHOWN_PX))
    options: dict[str, Any] = {"duration": FRAME_MS, "loop": 0, "lossless": small, "quality": 80}
    with _whole(path) as partial:
        images[0].save(partial, "WEBP", save_all=True, append_images=images[1:], **options)


def keep_lossless(frames: np.ndarray, path: Path, fps: int) -> None:
    """Write a sample without loss beyond 8 bits: clips as mp4, images as png, as the suffix says."""
    if path.suffix == ".png":
        with _whole(path) as partial:
            Image.fromarray(to_uint8(frames[0])).save(partial, "PNG")
    else:
        write_lossless(frames, path, fps)


def write_lossless(frames: np.ndarray, path: Path, fps: int = 8) -> None:
    """Frames in [0, 1] as an RGB H.264 file without loss beyond 8 bits: codec noise must not be scored.

    Raises OSError, and leaves no file, if it was not written whole: on a full disk the encoder itself fails
    without a word.
    """
    import imageio.v2 as imageio  # type: ignore[import-untyped]

    settings: dict[str, Any] = {
        "codec": "libx264rgb",
        "pixelformat": "rgb24",
        "output_params": ["-crf", "0"],
        "macro_block_size": 1,
        "ffmpeg_log_level": "fatal",
    }
    try:
        with _whole(path) as partial:
            imageio.mimwrite(partial, list(to_uint8(frames)), fps=fps, **settings)
            if not is_whole_mp4(partial):
                raise OSError(errno.EIO, "the video was not written whole", str(path))
    except OSError as error:
        if error.errno == errno.ENOSPC or shutil.disk_usage(path.parent).free < FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place with the same suffix to write to, which becomes `path` at the end of the `with`, or is not left."""
    partial = path.with_name(f".{os.getpid()}.partial{path.suffix}")  # a clip's own name may be as long as names can be
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a sample or a preview is there and was written whole: pictures are read to their end, of clips the index."""
    try:
        if path.suffix == ".mp4":
            return is_whole_mp4(path)
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r").size > 0
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()
        return True
    except (OSError, ValueError, SyntaxError, EOFError):  # Pillow's decoders raise all of them
        return False


def is_whole_mp4(path: Path) -> bool:
    """Whether the boxes of an MP4 file fill it exactly and its index (`moov`), written last, is among them."""
    size, kinds, position = path.stat().st_size, [], 0
    with open(path, "rb") as file:
        while position + 8 <= size:
            file.seek(position)
            length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            if length == 1:  # a 64-bit length follows
                length = int.from_bytes(file.read(8), "big")
            if length < 8:
                return False
            kinds.append(kind)
            position += length
    return position == size and b"moov" in kinds


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] rounded to 8 bits."""
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
