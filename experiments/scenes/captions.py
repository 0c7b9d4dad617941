"""Scenes in English: several templates and paraphrases for each attribute.

The wording is drawn at random, so that the text encoder has to learn that "a tiny disc" and "a small circle"
ask for the same thing. A caption names every attribute of its scene that is not `ANY`, and no other.
"""

from __future__ import annotations

import re

import numpy as np

from experiments.scenes.attributes import ANY, Object, Scene

SIZE_WORDS = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium sized", "middle sized"),
    "large": ("large", "big", "huge"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "box"),
    "triangle": ("triangle", "three cornered shape"),
    "star": ("star", "five pointed star"),
}
COLOUR_WORDS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
}
BACKGROUND_WORDS = {
    "dark": ("dark", "nearly black"),
    "light": ("light", "bright"),
    "striped": ("striped",),
    "checkered": ("checkered", "checkerboard"),
}
MOTION_WORDS = {
    "still": ("standing still", "at rest", "not moving"),
    "left": ("moving left", "drifting to the left", "sliding left"),
    "right": ("moving right", "drifting to the right", "sliding right"),
    "up": ("moving up", "rising", "drifting upwards"),
    "down": ("moving down", "falling", "sinking"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
THING_WORDS = ("thing", "object")  # of any shape
Layout = tuple[int, bool, bool]  # objects, whether a motion is named, whether a background is
TEMPLATES: dict[Layout, tuple[str, ...]] = {
    (1, True, True): (
        "a {first} {motion} on a {background} background",
        "a {first}, {motion}, in front of a {background} background",
        "on a {background} background, a {first} is {motion}",
        "there is a {first} {motion} before a {background} backdrop",
    ),
    (2, True, True): (
        "a {first} {relation} a {second}, both {motion}, on a {background} background",
        "on a {background} background, a {first} {relation} a {second}, both {motion}",
        "there is a {first} {relation} a {second}, both {motion} before a {background} backdrop",
        "a {first} and a {second} {motion} on a {background} background, the first {relation} the second",
    ),
    (1, False, True): (
        "a {first} on a {background} background",
        "a {first} in front of a {background} background",
        "on a {background} background, a {first}",
        "there is a {first} before a {background} backdrop",
    ),
    (2, False, True): (
        "a {first} {relation} a {second} on a {background} background",
        "on a {background} background, a {first} {relation} a {second}",
        "there is a {first} {relation} a {second} before a {background} backdrop",
        "a {first} and a {second} on a {background} background, the first {relation} the second",
    ),
    (1, True, False): ("a {first} {motion}", "a {first} is {motion}", "there is a {first} {motion}"),
    (2, True, False): (
        "a {first} {relation} a {second}, both {motion}",
        "there is a {first} {relation} a {second}, both {motion}",
        "a {first} and a {second} {motion}, the first {relation} the second",
    ),
    (1, False, False): ("a {first}", "there is a {first}"),
    (2, False, False): (
        "a {first} {relation} a {second}",
        "there is a {first} {relation} a {second}",
        "a {first} and a {second}, the first {relation} the second",
    ),
}


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One caption of a scene; without `rng` the plain wording, always the same."""

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else options[rng.integers(len(options))]

    def phrase(thing: Object) -> str:
        asked = [SIZE_WORDS.get(thing.size), COLOUR_WORDS.get(thing.colour), SHAPE_WORDS.get(thing.shape, THING_WORDS)]
        return " ".join(choose(words) for words in asked if words)

    words = {"first": phrase(scene.objects[0])}
    if moves := scene.motion not in (None, ANY):
        words["motion"] = choose(MOTION_WORDS[scene.motion or ""])
    if stands := scene.background != ANY:
        words["background"] = choose(BACKGROUND_WORDS[scene.background])
    if scene.relation is not None:
        words |= {"second": phrase(scene.objects[1]), "relation": choose(RELATION_WORDS[scene.relation])}
    return choose(TEMPLATES[len(scene.objects), moves, stands]).format(**words)


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, the unit of the embedded models' tokenizer."""
    return re.findall(r"[a-z]+", text.lower())


def vocabulary(world: str = "plain") -> list[str]:
    """Every word that a caption of the world can hold, sorted."""
    texts = [text for templates in TEMPLATES.values() for text in templates]
    for table in (SIZE_WORDS, SHAPE_WORDS, COLOUR_WORDS, BACKGROUND_WORDS, MOTION_WORDS, RELATION_WORDS):
        texts += [option for options in table.values() for option in options]
    texts += THING_WORDS if world == "rich" else ()
    placeholders = re.compile(r"\{\w+\}")
    return sorted({word for text in texts for word in words_of(placeholders.sub(" ", text))})
