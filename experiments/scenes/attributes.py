"""What a scene can hold, how scenes are drawn at random, and how they are split.

A scene has one or two objects (shape, colour, size), a background, a motion that all its objects share
(none in a picture), and, with two objects, the relation of the first to the second. The split is by attribute combination:
no combination that a test prompt asks for was ever asked for in training or calibration.

There are two worlds. In the plain one a caption fixes nearly all that is seen. In the rich one a third of the captions leave
attributes out (`ANY`), and much is free that no caption speaks of (`experiments.scenes.rich`). What is drawn for an attribute
that is left out can make a combination that another split asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
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
WORLDS = ("plain", "rich")
ANY = "any"  # the value of an attribute that the caption leaves out
LEFT_OUT_SHARE = 1 / 3  # of the rich world's captions
TWO_OBJECT_SHARE = 0.4
MAX_DRAWS_IN_VAIN = 300
MAX_RADIUS_SUM_PX = 18.0  # of two objects: what fits side by side, moving, into 64 pixels


@dataclass(frozen=True)
class Object:
    """One coloured shape; `size` is a key of `RADII_PX`. Whatever is not asked for is `ANY`."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a caption asks for.

    `motion` is None in a picture. `relation` is that of the first object to the second, None if there is one.
    An attribute that the caption leaves out is `ANY`.
    """

    objects: tuple[Object, ...]
    background: str
    motion: str | None
    relation: str | None = None
    world: str = "plain"

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
    rng: np.random.Generator,
    split: str | None = None,
    num_objects: int | None = None,
    picture: bool = False,
    world: str = "plain",
) -> Scene:
    """Draw a scene of `split` (None: of any) with one or two objects (None: two in 40 % of the cases).

    A picture is a scene without motion.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; choose one of {', '.join(WORLDS)}")
    count = num_objects or (2 if rng.random() < TWO_OBJECT_SHARE else 1)
    while True:
        scene = _draw(rng, count, picture)
        if world == "rich":
            scene = _left_out(replace(scene, world=world), rng)
        if split is None or split_of(scene) == split:
            return scene


def sample_scenes(
    count: int, split: str, seed: int, num_objects: int | None = None, picture: bool = False, world: str = "plain"
) -> list[Scene]:
    """`count` different scenes of a split, always the same ones for a seed."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    scenes: dict[str, Scene] = {}
    in_vain = 0
    while len(scenes) < count:
        scene = sample_scene(rng, split, num_objects, picture, world)
        in_vain = in_vain + 1 if scene.key() in scenes else 0
        if in_vain > MAX_DRAWS_IN_VAIN:
            raise ValueError(f"the {split} split has fewer than {count} different scenes")
        scenes.setdefault(scene.key(), scene)
    return list(scenes.values())


def completed(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a value drawn for everything that its caption leaves out: what is rendered."""

    def value(current: str, values: Iterable[str]) -> str:
        return str(rng.choice(list(values))) if current == ANY else current

    taken = {o.colour for o in scene.objects}
    while True:
        sizes = [value(o.size, RADII_PX) for o in scene.objects]
        if fit_together(sizes):
            break
    objects = tuple(
        Object(value(o.shape, SHAPES), value(o.colour, [c for c in COLOURS if c not in taken]), size)
        for o, size in zip(scene.objects, sizes, strict=True)
    )
    motion = None if scene.motion is None else value(scene.motion, MOTIONS)
    return replace(scene, objects=objects, background=value(scene.background, BACKGROUNDS), motion=motion)


def fit_together(sizes: Sequence[str]) -> bool:
    """Whether objects of these sizes fit side by side, moving, into the frame. `ANY` can be the smallest."""
    radii = [min(RADII_PX.values()) if size == ANY else RADII_PX[size] for size in sizes]
    return len(radii) == 1 or sum(radii) <= MAX_RADIUS_SUM_PX


def _draw(rng: np.random.Generator, count: int, picture: bool) -> Scene:
    colours = rng.permutation(list(COLOURS))[:count]  # two objects never share a colour
    while True:
        sizes = [str(size) for size in rng.choice(list(RADII_PX), size=count)]
        if fit_together(sizes):
            break
    objects = tuple(
        Object(str(rng.choice(SHAPES)), str(colour), size) for colour, size in zip(colours, sizes, strict=True)
    )
    return Scene(
        objects=objects,
        background=str(rng.choice(BACKGROUNDS)),
        motion=None if picture else str(rng.choice(list(MOTIONS))),
        relation=str(rng.choice(list(RELATIONS))) if count == 2 else None,
    )


def _left_out(scene: Scene, rng: np.random.Generator) -> Scene:
    """In a third of the cases one or two attributes less: of each object at most one, and of two one keeps its colour."""
    if rng.random() >= LEFT_OUT_SHARE:
        return scene
    places = ["background", *(["motion"] if scene.motion else []), *range(len(scene.objects))]
    chosen = rng.permutation(np.array(places, dtype=object))[: rng.integers(1, 3)]
    objects = list(scene.objects)
    for place in chosen:
        if place == "background":
            scene = replace(scene, background=ANY)
        elif place == "motion":
            scene = replace(scene, motion=ANY)
        else:
            another_lacks_its_colour = any(o.colour == ANY for o in objects)
            kinds = ["shape", "size"] if another_lacks_its_colour else ["shape", "size", "colour"]
            objects[place] = replace(objects[place], **{str(rng.choice(kinds)): ANY})
    return replace(scene, objects=tuple(objects))
