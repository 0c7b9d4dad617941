"""What both worlds have in common: the frame, how far and how near things are, and their shapes as coverage of pixels."""

from __future__ import annotations

import numpy as np

from experiments.scenes.attributes import MOTIONS, Scene

SIZE_PX = 64
NUM_FRAMES = 9
TRAVEL_PX = 12.0  # way of a moving object from the first frame to the last
EXTENT = 1.25  # of every shape, in radii: nothing is drawn farther from the centre
MIN_GAP_PX, MAX_GAP_PX = 1.5, 10.0  # between two objects
MARGIN_PX = 0.5  # to the frame's edge


def shape_alpha(shape: str, radius_px: float, centres: np.ndarray, angle: float = 0.0) -> np.ndarray:
    """Coverage in [0, 1] of a shape at each centre: centres (n, 2) as x, y → (n, SIZE_PX, SIZE_PX).

    `angle` is that by which it is turned, in radians, clockwise.
    """
    x, y = seen_from(centres, angle)
    return np.clip(0.5 - _signed_distance(shape, x, y, radius_px), 0.0, 1.0)


def way_of(scene: Scene) -> np.ndarray:
    """Of every object from the first frame to the last, x and y in pixels."""
    return np.array(MOTIONS[scene.motion or "still"]) * TRAVEL_PX


def seen_from(centres: np.ndarray, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's place in an object's own turned axes: centres (n, 2) → x and y in pixels, (n, SIZE_PX, SIZE_PX)."""
    axis = np.arange(SIZE_PX) + 0.5
    x = axis[None, None, :] - centres[:, 0, None, None]
    y = axis[None, :, None] - centres[:, 1, None, None]
    if angle == 0:
        return x, y
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Approximate signed distance in pixels, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    if shape == "triangle":  # upright, equilateral, circumradius 1.25 r
        return np.maximum(np.maximum(0.8660254 * x - 0.5 * y, -0.8660254 * x - 0.5 * y), y) - 0.5 * EXTENT * r
    if shape == "star":
        return _star_distance(x, y, EXTENT * r, 0.5)
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(x: np.ndarray, y: np.ndarray, outer: float, inner_ratio: float) -> np.ndarray:
    """Five points, one upwards: distance to the nearest edge line of the folded wedge."""
    angle = np.arctan2(x, -y)
    wedge = 2 * np.pi / 5
    folded = np.abs((angle + wedge / 2) % wedge - wedge / 2)  # 0 at a tip, wedge/2 at a notch
    radius = np.hypot(x, y)
    tip = np.array([outer, 0.0])
    notch = outer * inner_ratio * np.array([np.cos(wedge / 2), np.sin(wedge / 2)])
    edge = (notch - tip) / np.linalg.norm(notch - tip)
    px, py = radius * np.cos(folded) - tip[0], radius * np.sin(folded) - tip[1]
    return px * edge[1] - py * edge[0]
