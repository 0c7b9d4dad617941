"""Clips on a page: both sides of a pair as two still pictures with all frames, which one animation plays in step.

Two animated files side by side start when each is decoded and drift apart. Here every frame lies in a grid on one still
WebP, and a CSS animation shows them in turn: the clock is the page's, so all clips show the same frame. The difference
is drawn by the browser from the same two pictures (`background-blend-mode`), and made brighter by a filter.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from analysis import plots

FRAME_S = 0.125
MAX_FRAMES = 49  # of a clip; longer ones show as many, evenly spaced, in the same time
SMALL_PX = 208  # wide: up to here frames are shown enlarged, pixel by pixel, and kept without loss
MAX_BYTES = 80_000_000  # of the clips of a page
ARMS = ("uncached", "cached")


@dataclass(frozen=True)
class Film:
    """Both sides of a pair: data URIs of two pictures with the same grid of frames.

    Attributes:
        frames, columns, rows: how many frames there are, and how they lie, line by line.
        width, height: of a frame, in pixels.
        seconds: that playing it takes once.
    """

    uncached: str
    cached: str
    frames: int
    columns: int
    rows: int
    width: int
    height: int
    seconds: float

    @property
    def is_small(self) -> bool:
        """Whether its pixels are shown enlarged."""
        return self.width <= SMALL_PX

    @property
    def animation(self) -> str:
        """The name of its keyframes."""
        return f"film-{self.frames}-{self.columns}"

    @property
    def keyframes(self) -> list[tuple[float, float, float]]:
        """Percent of the time, and the background's position in percent from left and top, of every frame."""
        across, down = max(self.columns - 1, 1), max(self.rows - 1, 1)
        return [
            (100 * k / self.frames, 100 * (k % self.columns) / across, 100 * (k // self.columns) / down)
            for k in range(self.frames)
        ]


@dataclass(frozen=True)
class Pair:
    """What a page shows of a prompt: its film, its numbers, and what each side shows of what was asked for."""

    film: Film
    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    uncached_scene: str
    cached_scene: str

    @property
    def psnr(self) -> str:
        """For people."""
        return "identical" if self.psnr_db is None else f"{self.psnr_db:.2f} dB"


@dataclass(frozen=True)
class Gallery:
    """Pairs with the factor by which their differences are made brighter at first."""

    pairs: list[Pair]
    factor: int
    total: int

    @property
    def moves(self) -> bool:
        """Whether there is anything to play."""
        return any(pair.film.frames > 1 for pair in self.pairs)

    @property
    def films(self) -> dict[str, Film]:
        """One film for every animation that is needed."""
        return {pair.film.animation: pair.film for pair in self.pairs if pair.film.frames > 1}


def gallery(folder: Path, rows: Sequence[dict[str, Any]], limit: int) -> Gallery:
    """The pairs of a run folder: `samples/uncached/000.webp` and so on, with the lines of its `per_prompt.jsonl`.

    At most `limit` pairs, and no more than `MAX_BYTES` of them. Raises OSError for a clip that is absent or damaged.
    """
    pairs: list[Pair] = []
    differences: list[np.ndarray] = []
    size = 0
    for row in rows[:limit]:
        frames = [read_frames(folder / "samples" / arm / f"{row['index']:03d}.webp") for arm in ARMS]
        film = make_film(*frames)
        size += len(film.uncached) + len(film.cached)
        if pairs and size > MAX_BYTES:
            break
        differences.append(plots.difference(*frames))
        pairs.append(
            Pair(
                film=film,
                prompt=row["prompt"],
                seed=row["seed"],
                psnr_db=row["psnr_db"],
                ssim=row["ssim"],
                uncached_scene=what_is_wrong(row["uncached"]["scene"]),
                cached_scene=what_is_wrong(row["cached"]["scene"]),
            )
        )
    return Gallery(pairs, plots.amplification(differences) if differences else 1, len(rows))


def what_is_wrong(scene: dict[str, bool] | None) -> str:
    """What a sample shows of what was asked for; nothing where that cannot be checked."""
    if scene is None:
        return ""
    wrong = [key for key, right in scene.items() if not right and key != "all"]
    return "wrong: " + ", ".join(wrong) if wrong else "as asked" if scene["all"] else "an object too many"


def read_frames(path: Path) -> np.ndarray:
    """(frames, height, width, 3) as uint8, of an animated WebP or a picture."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def make_film(uncached: np.ndarray, cached: np.ndarray) -> Film:
    """Both sides, each (frames, height, width, 3) as uint8, as a film of at most `MAX_FRAMES` frames."""
    seconds = len(uncached) * FRAME_S
    kept = np.linspace(0, len(uncached) - 1, min(len(uncached), MAX_FRAMES)).round().astype(int)
    uncached, cached = _native(uncached[kept], cached[kept])
    count, height, width, _ = uncached.shape
    columns = min(count, max(1, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    lossless = width <= SMALL_PX
    stills = [_as_webp(_in_a_grid(frames, columns, rows), lossless) for frames in (uncached, cached)]
    return Film(stills[0], stills[1], count, columns, rows, width, height, seconds)


def _native(uncached: np.ndarray, cached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undo the enlargement of small clips: halve both sides while every 2×2 pixels are equal."""
    while min(uncached.shape[1:3]) >= 32 and all(
        np.array_equal(frames[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2), frames) for frames in (uncached, cached)
    ):
        uncached, cached = uncached[:, ::2, ::2], cached[:, ::2, ::2]
    return uncached, cached


def _in_a_grid(frames: np.ndarray, columns: int, rows: int) -> Image.Image:
    count, height, width, _ = frames.shape
    padded = np.concatenate([frames, np.zeros((columns * rows - count, height, width, 3), np.uint8)])
    lines = padded.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(lines).reshape(rows * height, columns * width, 3))


def _as_webp(still: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    still.save(buffer, "WEBP", lossless=lossless, quality=90)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """A picture that lies in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
