"""The rich world: what is free in a picture that no caption speaks of.

In the plain world a prompt fixes nearly everything, so a small error on the way can only die out. Here a scene with one
object has at least 25 continuous freedoms more, as pictures of a real model have:

- every object: where it is (2), how it is turned, how large exactly, hue and brightness, and a grain of stripes with
  period, direction, phase and strength;
- the background: brightness, and of stripes and fields period, direction, phase and sharpness, over a soft texture;
- the light: direction and strength of its fall across the picture;
- three to eight grey specks: where (2 each), how large, how bright.

The order is that of painting: background, specks, objects, light.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.scenes.attributes import COLOURS, RADII_PX, RELATIONS, Object, Scene, completed
from experiments.scenes.shapes import (
    EXTENT,
    MARGIN_PX,
    MAX_GAP_PX,
    MIN_GAP_PX,
    SIZE_PX,
    seen_from,
    shape_alpha,
    way_of,
)

SIZE_SPREAD = 0.08  # of the radius, to both sides
HUE_SPREAD = 0.02  # of the circle, to both sides: 7 degrees, where two palette colours are at least 24 apart
BRIGHTNESS = (0.88, 1.0)  # of the palette colour
GRAIN_PERIOD_PX, GRAIN_STRENGTH = (5.0, 10.0), (0.03, 0.12)
LEVELS = {"dark": (0.11, 0.19), "light": (0.76, 0.84), "striped": (0.44, 0.54), "checkered": (0.44, 0.54)}
PATTERN_PERIOD_PX, PATTERN_DEPTH, PATTERN_SHARPNESS = (13.0, 20.0), 0.20, (0.6, 3.0)
TEXTURE_DEPTH = 0.03
LIGHT_FALL = (0.05, 0.28)  # across the picture
NUM_SPECKS = (3, 8)
SPECK_RADIUS_PX, SPECK_CONTRAST = (0.9, 1.9), (0.12, 0.28)


@dataclass(frozen=True)
class Look:
    """What is free in one object, besides where it is: `radius_px`, `angle` in radians, `colour` as RGB, its grain."""

    radius_px: float
    angle: float
    colour: np.ndarray
    grain_period_px: float
    grain_angle: float
    grain_phase: float
    grain_strength: float


def render(scene: Scene, rng: np.random.Generator, count: int) -> np.ndarray:
    """Frames of a scene: float32 (count, SIZE_PX, SIZE_PX, 3) in [0, 1]. What the scene leaves open is drawn as well."""
    scene = completed(scene, rng)
    ground = _background(scene.background, rng)
    frames = np.repeat(_with_specks(ground, rng)[None, :, :, None], count, axis=0).repeat(3, axis=3)
    looks = [_look(thing, rng) for thing in scene.objects]
    way = way_of(scene)
    for thing, look, start in zip(scene.objects, looks, start_positions(scene, looks, way, rng), strict=True):
        centres = start + way * (np.arange(count)[:, None] / max(count - 1, 1))
        alpha = shape_alpha(thing.shape, look.radius_px, centres, look.angle)[..., None]
        frames = frames * (1 - alpha) + alpha * _grained(look, centres)
    return np.clip(frames * _light(rng)[None, :, :, None], 0, 1).astype(np.float32)


def start_positions(scene: Scene, looks: Sequence[Look], way: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Centres (x, y) in the first frame, anywhere such that every object stays inside the frame throughout."""
    reach = np.array([EXTENT * look.radius_px for look in looks])
    low = [reach + MARGIN_PX - min(way[axis], 0) for axis in (0, 1)]
    high = [SIZE_PX - reach - MARGIN_PX - max(way[axis], 0) for axis in (0, 1)]
    if scene.relation is None:
        return [np.array([rng.uniform(low[axis][0], high[axis][0]) for axis in (0, 1)])]
    axis = 0 if RELATIONS[scene.relation][0] else 1
    ahead, behind = (0, 1) if RELATIONS[scene.relation][axis] < 0 else (1, 0)  # the one nearer to 0, the other
    room = high[axis][behind] - low[axis][ahead] - reach.sum()
    gap = rng.uniform(MIN_GAP_PX, min(MAX_GAP_PX, room))
    first = rng.uniform(low[axis][ahead], low[axis][ahead] + room - gap)
    along = {ahead: first, behind: first + reach.sum() + gap}
    across = rng.uniform(low[1 - axis].max(), high[1 - axis].min())
    return [np.array([along[k], across] if axis == 0 else [across, along[k]]) for k in (0, 1)]


def _look(thing: Object, rng: np.random.Generator) -> Look:
    hue, saturation, value = colorsys.rgb_to_hsv(*COLOURS[thing.colour])
    hue = (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1
    return Look(
        radius_px=RADII_PX[thing.size] * (1 + rng.uniform(-SIZE_SPREAD, SIZE_SPREAD)),
        angle=rng.uniform(0, 2 * np.pi),
        colour=np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * rng.uniform(*BRIGHTNESS),
        grain_period_px=rng.uniform(*GRAIN_PERIOD_PX),
        grain_angle=rng.uniform(0, np.pi),
        grain_phase=rng.uniform(0, 2 * np.pi),
        grain_strength=rng.uniform(*GRAIN_STRENGTH),
    )


def _grained(look: Look, centres: np.ndarray) -> np.ndarray:
    """The object's colour with its grain, which moves along: centres (n, 2) → (n, SIZE_PX, SIZE_PX, 3)."""
    along, _ = seen_from(centres, look.grain_angle)
    wave = np.sin(2 * np.pi * along / look.grain_period_px + look.grain_phase)
    return (1 + look.grain_strength * wave)[..., None] * look.colour


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Grey background (SIZE_PX, SIZE_PX): a level, a pattern turned at will, a soft texture."""
    place = np.array([[SIZE_PX / 2, SIZE_PX / 2]])
    (x,), (y,) = seen_from(place, rng.uniform(0, np.pi))
    period, sharpness = rng.uniform(*PATTERN_PERIOD_PX), rng.uniform(*PATTERN_SHARPNESS)
    phase = rng.uniform(0, 2 * np.pi, size=4)
    wave = np.sin(2 * np.pi * x / period + phase[0])
    if kind == "checkered":
        wave = wave * np.sin(2 * np.pi * y / period + phase[1])
    elif kind != "striped":
        wave = np.zeros_like(wave)
    axis = np.arange(SIZE_PX) / SIZE_PX
    soft = [np.sin(2 * np.pi * rng.uniform(0.5, 1.5) * axis + one) for one in phase[2:]]
    pattern = PATTERN_DEPTH * np.tanh(sharpness * wave) / np.tanh(sharpness)
    return rng.uniform(*LEVELS[kind]) + pattern + TEXTURE_DEPTH * soft[0][None, :] * soft[1][:, None]


def _with_specks(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The background with a few grey discs, each lighter or darker than the place where it lies."""
    for _ in range(rng.integers(NUM_SPECKS[0], NUM_SPECKS[1] + 1)):
        centre = rng.uniform(1, SIZE_PX - 1, size=2)
        alpha = shape_alpha("circle", rng.uniform(*SPECK_RADIUS_PX), centre[None])[0]
        here = ground[int(centre[1]), int(centre[0])]
        level = here + rng.uniform(*SPECK_CONTRAST) * (1 if here < rng.uniform(0.3, 0.7) else -1)
        ground = ground * (1 - alpha) + alpha * level
    return ground


def _light(rng: np.random.Generator) -> np.ndarray:
    """What the light multiplies every pixel by: it falls in one direction, and is 1 in the middle."""
    (x,), _ = seen_from(np.array([[SIZE_PX / 2, SIZE_PX / 2]]), rng.uniform(0, 2 * np.pi))
    return 1 + rng.uniform(*LIGHT_FALL) * x / SIZE_PX
