"""Draw a scene as frames: anti-aliased shapes over a grey textured background.

Only the attributes are fixed by the scene. In the plain world positions (on a lattice), stripe phases and the background's
soft texture are free, so one caption has many right pictures, as for a real text-to-video model. In the rich world much
more is (`experiments.scenes.rich`).
"""

from __future__ import annotations

import numpy as np

from experiments.scenes import rich
from experiments.scenes.attributes import COLOURS, RADII_PX, RELATIONS, Scene
from experiments.scenes.shapes import (
    EXTENT,
    MARGIN_PX,
    MAX_GAP_PX,
    MIN_GAP_PX,
    NUM_FRAMES,
    SIZE_PX,
    shape_alpha,
    way_of,
)

LATTICE_PX = 4.0  # of the centres in the first frame: half a cell of the latents, few enough places to learn


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Frames of a scene: float32 (NUM_FRAMES, SIZE_PX, SIZE_PX, 3) in [0, 1]; a picture has one."""
    count = NUM_FRAMES if scene.motion else 1
    if scene.world == "rich":
        return rich.render(scene, rng, count)
    frames = np.repeat(_background(scene.background, rng)[None, :, :, None], count, axis=0)
    frames = np.repeat(frames, 3, axis=3)
    starts = start_positions(scene, rng)
    step = way_of(scene) / (NUM_FRAMES - 1)
    for start, thing in zip(starts, scene.objects, strict=True):
        centres = start + step * np.arange(count)[:, None]
        alpha = shape_alpha(thing.shape, RADII_PX[thing.size], centres)[..., None]
        frames = frames * (1 - alpha) + alpha * np.array(COLOURS[thing.colour])
    return frames.astype(np.float32)


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Grey background (SIZE_PX, SIZE_PX) with a soft random texture."""
    axis = (np.arange(SIZE_PX) + 0.5) / SIZE_PX
    x, y = axis[None, :], axis[:, None]
    phase = rng.uniform(0, 2 * np.pi, size=4)
    texture = (
        0.04
        * np.sin(2 * np.pi * (rng.uniform(0.5, 1.5) * x) + phase[0])
        * np.sin(2 * np.pi * (rng.uniform(0.5, 1.5) * y) + phase[1])
    )
    if kind == "dark":
        base = np.full((SIZE_PX, SIZE_PX), 0.14)
    elif kind == "light":
        base = np.full((SIZE_PX, SIZE_PX), 0.84)
    elif kind == "striped":  # vertical, period 16 pixels
        base = 0.48 + 0.20 * np.sin(2 * np.pi * 4 * x + phase[2]) + 0 * y
    elif kind == "checkered":  # fields of 10.7 pixels
        product = np.sin(2 * np.pi * 3 * x + phase[2]) * np.sin(2 * np.pi * 3 * y + phase[3])
        base = 0.48 + 0.20 * np.tanh(2.5 * product)
    else:
        raise ValueError(f"unknown background {kind!r}")
    return base + texture


def start_positions(scene: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    """Centres (x, y) in the first frame, on the lattice, such that every object stays inside the frame throughout."""
    low_way, high_way = np.minimum(way_of(scene), 0), np.maximum(way_of(scene), 0)

    def points(axis: int, reach: float) -> np.ndarray:
        """Where along an axis an object that reaches so far can start."""
        low = reach + MARGIN_PX - low_way[axis]
        high = SIZE_PX - reach - MARGIN_PX - high_way[axis]
        return LATTICE_PX * np.arange(np.ceil(low / LATTICE_PX), np.floor(high / LATTICE_PX) + 1)

    reach = [EXTENT * RADII_PX[o.size] for o in scene.objects]
    if len(scene.objects) == 1:
        return [np.array([rng.choice(points(axis, reach[0])) for axis in (0, 1)])]
    if scene.relation is None:
        raise ValueError("a scene with two objects needs a relation")
    axis = 0 if RELATIONS[scene.relation][0] else 1
    first_is_low = RELATIONS[scene.relation][axis] < 0
    low_reach, high_reach = reach if first_is_low else reach[::-1]
    pairs = [
        (low, high)
        for low in points(axis, low_reach)
        for high in points(axis, high_reach)
        if MIN_GAP_PX <= high - low - low_reach - high_reach <= MAX_GAP_PX
    ]
    along = pairs[rng.integers(len(pairs))]
    across = rng.choice(points(1 - axis, max(reach)))
    starts = [np.array([place, across] if axis == 0 else [across, place]) for place in along]
    return starts if first_is_low else starts[::-1]
