"""The scene world: short clips whose content is known exactly, so that what a model drew can be checked.

`attributes` says what can be in a scene and splits scenes into train, calibration and test; `captions`
writes a scene in English; `render` draws it; `checker` reads it back from frames alone.
"""

from experiments.scenes.attributes import Object, Scene, sample_scene, sample_scenes
from experiments.scenes.captions import caption, vocabulary
from experiments.scenes.checker import CHANCE_LEVEL, Reading, agreement, read_clip
from experiments.scenes.render import render

__all__ = [
    "CHANCE_LEVEL",
    "Object",
    "Reading",
    "Scene",
    "agreement",
    "caption",
    "read_clip",
    "render",
    "sample_scene",
    "sample_scenes",
    "vocabulary",
]
