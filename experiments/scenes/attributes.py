"""What a scene can hold, how scenes are drawn at random, and how they are split.

A scene has one or two objects (shape, colour, size), a background, a motion that all its objects share
(none in a picture), and, with two objects, the relation of the first to the second. The split is by attribute combination:
no combination that a test prompt asks for was ever seen in training or calibration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {  # RGB in [0, 1]
    "red": (0.87, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.12, 0.68, 0.25),
    "blue": (0.12, 0.32, 0.92),
    "purple": (0.62, 0.15, 0.80),
}
RADII_PX = {"small": 7.5, "medium": 10.5, "large": 14.5}
BACKGROUNDS = ("dark", "light", "striped", "checkered")
MOTIONS = {  # unit vector (x to the right, y downwards)
    "still": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
RELATIONS = {  # unit vector from the second object to the first
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "calibration", "test")
TWO_OBJECT_SHARE = 0.4
MAX_DRAWS_IN_VAIN = 300
MAX_RADIUS_SUM_PX = 18.0  # of two objects: what fits side by side, moving, into 64 pixels


@dataclass(frozen=True)
class Object:
    """One coloured shape; `size` is a key of `RADII_PX`."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a caption asks for.

    `motion` is None in a picture. `relation` is that of the first object to the second, None if there is one.
    """

    objects: tuple[Object, ...]
    background: str
    motion: str | None
    relation: str | None = None

    def key(self) -> str:
        """The attribute combination as one line of text, the unit of the split."""
        parts = [f"{o.size} {o.colour} {o.shape}" for o in self.objects]
        return "|".join([*parts, self.background, self.motion or "-", self.relation or "-"])

    def mirrored(self) -> Scene:
        """The same picture in other words: "a above b" as "b below a". A scene with one object is its own mirror."""
        if self.relation is None:
            return self
        return replace(self, objects=self.objects[::-1], relation=OPPOSITE[self.relation])


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to: a hash of its attributes decides.

    A scene is held out only if its mirror falls into the same held-out split, so no test picture was ever
    described in training the other way round.
    """
    splits = {_split_of_key(scene.key()), _split_of_key(scene.mirrored().key())}
    return splits.pop() if len(splits) == 1 else "train"


def _split_of_key(key: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 84 else "calibration" if bucket < 88 else "test"


def sample_scene(
    rng: np.random.Generator, split: str | None = None, num_objects: int | None = None, picture: bool = False
) -> Scene:
    """Draw a scene of `split` (None: of any) with one or two objects (None: two in 40 % of the cases).

    A picture is a scene without motion.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    count = num_objects or (2 if rng.random() < TWO_OBJECT_SHARE else 1)
    while True:
        scene = _draw(rng, count, picture)
        if split is None or split_of(scene) == split:
            return scene


def sample_scenes(
    count: int, split: str, seed: int, num_objects: int | None = None, picture: bool = False
) -> list[Scene]:
    """`count` different scenes of a split, always the same ones for a seed."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    scenes: dict[str, Scene] = {}
    in_vain = 0
    while len(scenes) < count:
        scene = sample_scene(rng, split, num_objects, picture)
        in_vain = in_vain + 1 if scene.key() in scenes else 0
        if in_vain > MAX_DRAWS_IN_VAIN:
            raise ValueError(f"the {split} split has fewer than {count} different scenes")
        scenes.setdefault(scene.key(), scene)
    return list(scenes.values())


def _draw(rng: np.random.Generator, count: int, picture: bool) -> Scene:
    colours = rng.permutation(list(COLOURS))[:count]  # two objects never share a colour
    while True:
        sizes = rng.choice(list(RADII_PX), size=count)
        if count == 1 or sum(RADII_PX[s] for s in sizes) <= MAX_RADIUS_SUM_PX:
            break
    objects = tuple(
        Object(str(rng.choice(SHAPES)), str(colour), str(size)) for colour, size in zip(colours, sizes, strict=True)
    )
    return Scene(
        objects=objects,
        background=str(rng.choice(BACKGROUNDS)),
        motion=None if picture else str(rng.choice(list(MOTIONS))),
        relation=str(rng.choice(list(RELATIONS))) if count == 2 else None,
    )
