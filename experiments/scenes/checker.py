"""Read a scene back from frames alone: shape, colour, size, background, motion and relation.

The checker never sees the prompt. It separates coloured pixels from the grey background, groups them by
hue, follows each group through the frames, and compares its mask with rendered templates of every shape and
size; in the rich world also with turned ones. It refuses what fits no template, so noise and grey hold no object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from experiments.scenes.attributes import ANY, BACKGROUNDS, COLOURS, MOTIONS, RADII_PX, RELATIONS, SHAPES, Object, Scene
from experiments.scenes.shapes import SIZE_PX, shape_alpha

BLUR_PX = 0.8  # before segmentation, against noise
TEMPLATE_BLURS_PX = (BLUR_PX, 1.4)
MIN_SATURATION = 0.22  # max - min of RGB: grey backgrounds stay below
MIN_AREA_PX = 35  # the smallest shape, a small star, covers about 75 pixels
MIN_OVERLAP = 0.60  # mean intersection over union with the best template: below, it is no object
MIN_SHAPE_FIT = {  # overlap, and its lead over the next best shape; below either, an object has no known shape
    "circle": (0.80, 0.0),
    "square": (0.80, 0.0),  # a small one comes rounded out of the autoencoder: no lead over the circle can be asked
    "triangle": (0.65, 0.02),
    "star": (0.65, 0.04),  # small blobs overlap with it by 0.77, large clear stars by 0.72: the lead tells them apart
}
SYMMETRY = {"square": 4, "triangle": 3, "star": 5}  # turned by a full circle over this a shape is itself
AREA = {
    shape: float(shape_alpha(shape, 16.0, np.array([[32.0, 32.0]])).sum()) / 16.0**2 for shape in SHAPES
}  # of radius 1
ANGLE_STEP = np.deg2rad(8)
MIN_DEVIATION = 0.09  # of a background that has a pattern
MIN_FLAT_DEVIATION = 0.06  # the same once the fall of the light is taken off
SLOPE_BLUR_PX = 1.0
MIN_COHERENCE = 0.5  # of the slopes of stripes; of fields it is near 0
MIN_FRAME_SHARE = 0.6  # of the frames in which an object must be seen
STILL_BELOW_PX = 4.0  # way from first to last frame; a moving object goes 12
CHANCE_LEVEL = {
    "shape": 1 / len(SHAPES),
    "colour": 1 / len(COLOURS),
    "size": 1 / len(RADII_PX),
    "background": 1 / len(BACKGROUNDS),
    "motion": 1 / len(MOTIONS),
    "relation": 1 / len(RELATIONS),
}


@dataclass(frozen=True)
class SeenObject:
    """An object that was found; `centre` (x, y) is its mean position, `overlap` how well its template fits.

    `shape` is None if the best template fits too badly, or hardly better than another: a blob is no star, though
    a star may fit it best.
    """

    shape: str | None
    colour: str
    size: str
    centre: tuple[float, float]
    travel: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a clip shows. `motion` is None when there is no object."""

    objects: tuple[SeenObject, ...]
    background: str
    motion: str | None


def read_clip(frames: np.ndarray, world: str = "plain") -> Reading:
    """Read frames (n, height, width, 3) with floats in [0, 1]; a single image (n = 1) has no motion to read.

    `world` says what can be expected: things that stand upright and are of exact sizes, or turned and of sizes around those.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be (n, height, width, 3), not {frames.shape}")
    if frames.shape[1:3] != (SIZE_PX, SIZE_PX):
        raise ValueError(f"scenes are {SIZE_PX}x{SIZE_PX} pixels, not {frames.shape[1]}x{frames.shape[2]}")
    frames = np.clip(frames.astype(np.float64), 0, 1)
    smooth = ndimage.gaussian_filter(frames, (0, BLUR_PX, BLUR_PX, 0))
    saturation = smooth.max(-1) - smooth.min(-1)
    hue_labels = _nearest_hue(smooth)
    objects = []
    for index, colour in enumerate(COLOURS):
        found = _read_object((saturation > MIN_SATURATION) & (hue_labels == index), saturation, colour, world)
        if found is not None:
            objects.append(found)
    objects.sort(key=lambda o: -o.overlap)
    background = (_read_turned_background if world == "rich" else _read_background)(smooth, saturation)
    return Reading(tuple(objects), background, _read_motion(objects))


def agreement(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Attribute by attribute: does the clip show what the scene asks for? What it does not ask for has
    no entry.

    An object that was asked for is matched by its colour first, then by position in the list of what was
    seen. `all` also needs the right number of objects.
    """
    matched = _match(scene.objects, reading.objects)
    right = {}
    for kind in ("shape", "colour", "size"):
        asked = [(getattr(o, kind), m) for o, m in matched if getattr(o, kind) != ANY]
        if asked:
            right[kind] = all(m is not None and getattr(m, kind) == value for value, m in asked)
    if scene.background != ANY:
        right["background"] = reading.background == scene.background
    if scene.motion not in (None, ANY):
        right["motion"] = reading.motion == scene.motion
    if scene.relation is not None:
        first, second = (seen for _, seen in matched)
        right["relation"] = first is not None and second is not None and _relation(first, second) == scene.relation
    right["all"] = all(right.values()) and len(reading.objects) == len(scene.objects)
    return right


def _nearest_hue(frames: np.ndarray) -> np.ndarray:
    """Index into COLOURS of the palette colour whose chroma direction is nearest, for each pixel."""
    palette = np.array(list(COLOURS.values()))

    def chroma(rgb: np.ndarray) -> np.ndarray:
        centred = rgb - rgb.mean(-1, keepdims=True)
        return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-6)

    return np.argmax(chroma(frames) @ chroma(palette).T, axis=-1)


def _read_object(mask: np.ndarray, saturation: np.ndarray, colour: str, world: str) -> SeenObject | None:
    """The object made of the masked pixels, or None if they are none; both arrays (n, height, width)."""
    parts, seen = [], []
    for index, frame_mask in enumerate(mask):
        part = _largest_component(frame_mask)
        if part is not None:
            parts.append(_coverage(part, saturation[index]))
            seen.append(index)
    if len(seen) < max(1, MIN_FRAME_SHARE * len(mask)):
        return None
    covered, times = np.stack(parts), np.array(seen)
    weight = covered.sum((1, 2))
    axis_y, axis_x = np.arange(covered.shape[1]) + 0.5, np.arange(covered.shape[2]) + 0.5
    centres = np.stack([(covered.sum(1) * axis_x).sum(1) / weight, (covered.sum(2) * axis_y).sum(1) / weight], axis=1)
    fits = {
        shape: _turned_fit(covered, shape, centres) if world == "rich" else _fit(covered, shape, centres)
        for shape in SHAPES
    }
    first, second = sorted(SHAPES, key=lambda shape: fits[shape][0], reverse=True)[:2]
    overlap, size = fits[first]
    if overlap < MIN_OVERLAP:
        return None
    travel = np.polyfit(times, centres, 1)[0] * (len(mask) - 1) if len(times) > 1 else np.zeros(2)
    x, y = centres.mean(0).tolist()
    least_overlap, least_lead = MIN_SHAPE_FIT[first]
    known = overlap >= least_overlap and overlap - fits[second][0] >= least_lead
    return SeenObject(first if known else None, colour, size, (x, y), (float(travel[0]), float(travel[1])), overlap)


def _coverage(part: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers: saturation relative to the object's own inner pixels."""
    inner = np.quantile(saturation[part], 0.75)
    near = ndimage.binary_dilation(part, iterations=2)
    return np.where(near, np.clip(saturation / inner, 0, 1), 0.0)


def _largest_component(mask: np.ndarray) -> np.ndarray | None:
    labels, count = ndimage.label(mask)
    if count == 0:
        return None
    areas = ndimage.sum_labels(mask, labels, index=np.arange(1, count + 1))
    if areas.max() < MIN_AREA_PX:
        return None
    return ndimage.binary_fill_holes(labels == 1 + int(areas.argmax()))


def _fit(covered: np.ndarray, shape: str, centres: np.ndarray) -> tuple[float, str]:
    """Overlap with the best upright template of a shape, and its size."""
    return max((_overlap(covered, shape_alpha(shape, radius, centres)), size) for size, radius in RADII_PX.items())


def _turned_fit(covered: np.ndarray, shape: str, centres: np.ndarray) -> tuple[float, str]:
    """The same where things are turned and of any size near the named ones: the radius is that of the area."""
    radius = float(np.sqrt(np.median(covered.sum((1, 2))) / AREA[shape]))
    few = np.linspace(0, len(covered) - 1, min(len(covered), 3)).round().astype(int)
    angles = np.arange(0, 2 * np.pi / SYMMETRY[shape], ANGLE_STEP) if shape in SYMMETRY else [0.0]
    turned = [(_overlap(covered[few], shape_alpha(shape, radius, centres[few], angle)), angle) for angle in angles]
    overlap = _overlap(covered, shape_alpha(shape, radius, centres, max(turned)[1]))
    return overlap, min(RADII_PX, key=lambda size: abs(np.log(radius / RADII_PX[size])))


def _overlap(covered: np.ndarray, template: np.ndarray) -> float:
    """Mean soft intersection over union with a template, at the better of two blurs; both arrays (n, height, width)."""
    scores = []
    for blur_px in TEMPLATE_BLURS_PX:
        blurred = ndimage.gaussian_filter(template, (0, blur_px, blur_px))
        intersection, union = np.minimum(covered, blurred), np.maximum(covered, blurred)
        scores.append(float((intersection.sum((1, 2)) / union.sum((1, 2))).mean()))
    return max(scores)


def _read_background(frames: np.ndarray, saturation: np.ndarray) -> str:
    """Brightness tells dark and light apart; the rest is striped if columns explain the variance."""
    picture, usable = _without_objects(frames, saturation)
    mean, deviation = picture[usable].mean(), picture[usable].std()
    if deviation < MIN_DEVIATION or mean < 0.28 or mean > 0.70:
        return "dark" if mean < 0.49 else "light"
    columns = (picture * usable).sum(0) / np.maximum(usable.sum(0), 1)
    explained = (((columns[None, :] - mean) ** 2) * usable).sum() / (((picture - mean) ** 2) * usable).sum()
    return "striped" if explained > 0.5 else "checkered"


def _read_turned_background(frames: np.ndarray, saturation: np.ndarray) -> str:
    """The same for patterns of any direction under light that falls off: slopes of stripes all point one way."""
    picture, usable = _without_objects(frames, saturation)
    y, x = np.nonzero(usable)
    plane = np.stack([np.ones(len(x)), x, y], axis=1)
    level = picture[usable]
    flat = level - plane @ np.linalg.lstsq(plane, level, rcond=None)[0]
    if flat.std() < MIN_FLAT_DEVIATION:
        return "dark" if level.mean() < 0.49 else "light"
    down, right = np.gradient(ndimage.gaussian_filter(picture, SLOPE_BLUR_PX))
    inside = ndimage.binary_erosion(usable, iterations=2, border_value=1)
    slopes = np.stack([right[inside], down[inside]])
    small, large = np.linalg.eigvalsh(slopes @ slopes.T)
    return "striped" if (large - small) / (large + small) > MIN_COHERENCE else "checkered"


def _without_objects(frames: np.ndarray, saturation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey picture of the background, mean over the frames that show it, and where any does; both (height, width)."""
    grey = frames.mean(-1)
    clear = ~ndimage.binary_dilation(saturation > 0.10, iterations=2, structure=np.ones((1, 3, 3), bool))
    if not clear.any():
        clear = np.ones_like(clear)
    count = clear.sum(0)
    usable = count > 0
    return np.where(usable, (grey * clear).sum(0) / np.maximum(count, 1), 0.0), usable


def _read_motion(objects: list[SeenObject]) -> str | None:
    if not objects:
        return None
    x, y = np.mean([o.travel for o in objects], axis=0)
    if np.hypot(x, y) < STILL_BELOW_PX:
        return "still"
    direction = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)))
    return next(name for name, vector in MOTIONS.items() if vector == direction)


def _relation(first: SeenObject, second: SeenObject) -> str | None:
    x, y = np.subtract(first.centre, second.centre)
    direction = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)))
    return next((name for name, vector in RELATIONS.items() if vector == direction), None)


def _match(asked: tuple[Object, ...], seen: tuple[SeenObject, ...]) -> list[tuple[Object, SeenObject | None]]:
    left = list(seen)
    pairs: dict[int, SeenObject | None] = {}
    for index, thing in enumerate(asked):
        same = next((s for s in left if s.colour == thing.colour), None)
        if same is not None:
            pairs[index] = same
            left.remove(same)
    for index in range(len(asked)):
        if index not in pairs:
            pairs[index] = left.pop(0) if left else None
    return [(thing, pairs[index]) for index, thing in enumerate(asked)]
