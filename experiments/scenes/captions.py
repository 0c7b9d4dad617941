"""Scenes in English: several templates and paraphrases for each attribute.

The wording is drawn at random, so that the text encoder has to learn that "a tiny disc" and "a small circle"
ask for the same thing. Every caption names every attribute that its scene has.
"""

from __future__ import annotations

import re

import numpy as np

from experiments.scenes.attributes import Object, Scene

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
TEMPLATES_ONE = (
    "a {first} {motion} on a {background} background",
    "a {first}, {motion}, in front of a {background} background",
    "on a {background} background, a {first} is {motion}",
    "there is a {first} {motion} before a {background} backdrop",
)
TEMPLATES_TWO = (
    "a {first} {relation} a {second}, both {motion}, on a {background} background",
    "on a {background} background, a {first} {relation} a {second}, both {motion}",
    "there is a {first} {relation} a {second}, both {motion} before a {background} backdrop",
    "a {first} and a {second} {motion} on a {background} background, the first {relation} the second",
)
PICTURE_TEMPLATES_ONE = (
    "a {first} on a {background} background",
    "a {first} in front of a {background} background",
    "on a {background} background, a {first}",
    "there is a {first} before a {background} backdrop",
)
PICTURE_TEMPLATES_TWO = (
    "a {first} {relation} a {second} on a {background} background",
    "on a {background} background, a {first} {relation} a {second}",
    "there is a {first} {relation} a {second} before a {background} backdrop",
    "a {first} and a {second} on a {background} background, the first {relation} the second",
)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One caption of a scene; without `rng` the plain wording, always the same."""

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else options[rng.integers(len(options))]

    def phrase(thing: Object) -> str:
        return (
            f"{choose(SIZE_WORDS[thing.size])} {choose(COLOUR_WORDS[thing.colour])} {choose(SHAPE_WORDS[thing.shape])}"
        )

    words = {"first": phrase(scene.objects[0])}
    if scene.motion is not None:
        words["motion"] = choose(MOTION_WORDS[scene.motion])
    words["background"] = choose(BACKGROUND_WORDS[scene.background])
    if scene.relation is None:
        return choose(TEMPLATES_ONE if scene.motion else PICTURE_TEMPLATES_ONE).format(**words)
    words |= {"second": phrase(scene.objects[1]), "relation": choose(RELATION_WORDS[scene.relation])}
    return choose(TEMPLATES_TWO if scene.motion else PICTURE_TEMPLATES_TWO).format(**words)


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, the unit of the embedded models' tokenizer."""
    return re.findall(r"[a-z]+", text.lower())


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [*TEMPLATES_ONE, *TEMPLATES_TWO, *PICTURE_TEMPLATES_ONE, *PICTURE_TEMPLATES_TWO]
    for table in (SIZE_WORDS, SHAPE_WORDS, COLOUR_WORDS, BACKGROUND_WORDS, MOTION_WORDS, RELATION_WORDS):
        texts += [option for options in table.values() for option in options]
    placeholders = re.compile(r"\{\w+\}")
    return sorted({word for text in texts for word in words_of(placeholders.sub(" ", text))})
