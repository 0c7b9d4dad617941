"""The rich world: what captions leave out, what is free, and a checker that stays exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from experiments.harness import checks
from experiments.scenes import __main__ as sheets
from experiments.scenes import agreement, caption, read_clip, render, rich, sample_scene, sample_scenes, vocabulary
from experiments.scenes.attributes import (
    ANY,
    COLOURS,
    LEFT_OUT_SHARE,
    MAX_RADIUS_SUM_PX,
    MOTIONS,
    RADII_PX,
    RELATIONS,
    WORLDS,
    Object,
    Scene,
    completed,
    split_of,
)
from experiments.scenes.captions import words_of
from experiments.scenes.rich import SIZE_SPREAD, Look, start_positions
from experiments.scenes.shapes import EXTENT, MAX_GAP_PX, MIN_GAP_PX, TRAVEL_PX
from tests.experiments.scenes.test_scenes import NOISE

ONE = Scene((Object("star", "red", "medium"),), "striped", "left", world="rich")


def accuracies(count: int, picture: bool, kind: str) -> dict[str, tuple[int, float]]:
    """By attribute, how often it was asked for, and how often it was read right."""
    rng, found = np.random.default_rng(11), {}
    for _ in range(count):
        scene = sample_scene(rng, world="rich", picture=picture)
        frames = render(scene, rng)
        if kind == "blurred":
            frames = ndimage.gaussian_filter(frames, (0, 1.0, 1.0, 0))
        if kind == "noisy":
            frames = np.clip(frames + rng.normal(0, NOISE, frames.shape), 0, 1)
        for name, right in agreement(scene, read_clip(frames, "rich")).items():
            found.setdefault(name, []).append(right)
    return {name: (len(values), float(np.mean(values))) for name, values in found.items()}


@pytest.mark.parametrize("kind", ["clean", "blurred", "noisy"])
def test_checker_is_right(kind):
    """At least 99 % per attribute. The slow test does the same on 500 pictures and 200 clips."""
    found = accuracies(100, True, kind)
    assert all(right >= 0.99 for _, right in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "blurred", "noisy"])
@pytest.mark.parametrize(("count", "picture"), [(500, True), (200, False)])
def test_checker_is_right_on_many(count, picture, kind):
    found = accuracies(count, picture, kind)
    print("\n", kind, picture, found)
    assert all(right >= 0.99 for _, right in found.values()), found


def test_checker_says_no_when_one_attribute_differs():
    """Mutant: turned templates that fit every shape."""
    rng, wrong = np.random.default_rng(3), []
    for _ in range(30):
        scene = sample_scene(rng, world="rich", num_objects=1, picture=True)
        scene = completed(scene, rng)
        (thing,) = scene.objects
        reading = read_clip(render(scene, rng), "rich")
        for kind, values in (
            ("shape", ("circle", "square", "triangle", "star")),
            ("colour", COLOURS),
            ("size", RADII_PX),
        ):
            other = str(rng.choice([value for value in values if value != getattr(thing, kind)]))
            wrong.append(agreement(replace(scene, objects=(replace(thing, **{kind: other}),)), reading)["all"])
    assert not any(wrong)


def test_what_is_left_out_is_not_asked():
    """Mutants: `ANY` compared like a value; an attribute of which one object is asked that is left out for both."""
    rng = np.random.default_rng(0)
    bare = Scene((Object(ANY, "red", "large"),), ANY, ANY, world="rich")
    for _ in range(5):
        right = agreement(bare, read_clip(render(bare, rng), "rich"))
        assert right == {"colour": True, "size": True, "all": True}
    nothing = agreement(bare, read_clip(np.full((9, 64, 64, 3), 0.5), "rich"))
    assert nothing == {"colour": False, "size": False, "all": False}
    pair = Scene((Object(ANY, "red", "small"), Object("circle", "blue", ANY)), "dark", None, "above", "rich")
    assert set(agreement(pair, read_clip(render(pair, rng), "rich"))) == {
        "shape", "colour", "size", "background", "relation", "all",
    }  # fmt: skip


def test_a_third_of_the_captions_leave_something_out():
    """Mutants: a caption that names what is left out, two objects without a colour, a held-out caption in training."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, world="rich") for _ in range(3000)]
    share = np.mean([ANY in scene.key() for scene in scenes])
    assert abs(share - LEFT_OUT_SHARE) < 0.03
    assert all(sum(o.colour == ANY for o in scene.objects) <= 1 for scene in scenes)
    assert all([o.shape, o.colour, o.size].count(ANY) <= 1 for scene in scenes for o in scene.objects)
    known = set(vocabulary("rich"))
    assert all(set(words_of(caption(scene, rng))) <= known for scene in scenes)
    assert caption(Scene((Object(ANY, "red", "large"),), ANY, "left", world="rich")) == "a large red thing moving left"
    assert caption(Scene((Object("star", ANY, ANY),), "dark", None, world="rich")) == "a star on a dark background"
    test = sample_scenes(60, "test", 0, world="rich")
    assert all(split_of(scene) == "test" for scene in test) and any(ANY in scene.key() for scene in test)


def test_what_is_left_out_is_drawn():
    """Mutants: two objects of one colour, sizes that do not fit beside each other, something asked for exchanged."""
    rng = np.random.default_rng(0)
    pair = Scene((Object(ANY, "red", ANY), Object("circle", ANY, "medium")), ANY, ANY, "above", "rich")
    drawn = [completed(pair, rng) for _ in range(100)]
    assert ANY not in {value for scene in drawn for o in scene.objects for value in (o.shape, o.colour, o.size)}
    assert all(scene.objects[0].colour == "red" != scene.objects[1].colour for scene in drawn)
    assert all(sum(RADII_PX[o.size] for o in scene.objects) <= MAX_RADIUS_SUM_PX for scene in drawn)
    assert len({scene.key() for scene in drawn}) > 50
    assert {scene.motion for scene in drawn} == set(MOTIONS)


@pytest.mark.parametrize("relation", [None, *RELATIONS])
@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_start_anywhere_and_stay_apart_and_inside(motion, relation):
    """Mutants: the motion forgotten in the bounds, the gap without the second object's reach, a lattice."""
    rng = np.random.default_rng(0)
    way = TRAVEL_PX * np.array(MOTIONS[motion])
    sizes = ["large"] if relation is None else ["small", "medium"]
    scene = Scene(tuple(Object("star", "red", size) for size in sizes), "dark", motion, relation, "rich")
    radii = np.array([RADII_PX[size] * (1 + SIZE_SPREAD) for size in sizes])
    looks = [Look(radius, 0.0, np.zeros(3), 5.0, 0.0, 0.0, 0.1) for radius in radii]
    places = np.array([start_positions(scene, looks, way, rng) for _ in range(30)])  # (30, objects, 2)
    reach = EXTENT * radii[:, None]
    for centres in (places, places + way):
        assert (centres - reach > 0).all() and (centres + reach < 64).all()
    assert len(np.unique(places[:, 0])) == 60
    if relation is not None:
        apart = (places[:, 0] - places[:, 1]) @ np.array(RELATIONS[relation]) - reach.sum()
        assert (apart >= MIN_GAP_PX - 1e-9).all() and (apart <= MAX_GAP_PX + 1e-9).all()


def dimensions(world: str) -> float:
    """Over how many directions the pictures of one caption spread: exp of the entropy of their principal components."""
    scene = Scene((Object("star", "red", "medium"),), "dark", None, world=world)
    flat = np.stack([render(scene, np.random.default_rng(seed))[0].ravel() for seed in range(60)])
    shares = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    shares = shares[:-1] / shares.sum()  # the mean takes one
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_one_caption_has_many_pictures():
    """Mutant: scenes of the rich world drawn by the plain one's renderer."""
    first, same, other = (render(ONE, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert first.shape == (9, 64, 64, 3) and first.min() >= 0 and first.max() <= 1
    assert np.abs(first - other).mean() > 0.05
    assert dimensions("rich") > 1.15 * dimensions("plain")


FIXED = {
    "BRIGHTNESS": (1.0, 1.0), "GRAIN_PERIOD_PX": (5.0, 5.0), "GRAIN_STRENGTH": (0.0, 0.0), "HUE_SPREAD": 0.0,
    "LEVELS": {"striped": (0.5, 0.5)}, "LIGHT_FALL": (0.0, 0.0), "NUM_SPECKS": (0, 0), "PATTERN_PERIOD_PX": (13.0, 13.0),
    "PATTERN_SHARPNESS": (1.0, 1.0), "SIZE_SPREAD": 0.0, "SPECK_CONTRAST": (0.2, 0.2), "SPECK_RADIUS_PX": (1.0, 1.0),
    "TEXTURE_DEPTH": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_every_freedom_is_used(name, monkeypatch):
    """Without it the picture is another one. Mutant: a constant that nothing reads."""
    free = render(ONE, np.random.default_rng(4))
    monkeypatch.setattr(rich, name, FIXED[name])
    assert np.abs(render(ONE, np.random.default_rng(4)) - free).max() > 1e-3


def test_a_sheet_of_both_worlds(tmp_path, capsys):
    assert sheets.main([str(tmp_path / "worlds.png"), "--seed", "3"]) == 0
    assert Image.open(tmp_path / "worlds.png").width > 1000 and "written" in capsys.readouterr().out
    assert sheets.main([str(tmp_path / "nowhere" / "worlds.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sheets.main([str(tmp_path / "worlds.png"), "--seed", "-1"])


def test_the_worlds_are_those_of_the_configuration():
    assert checks.WORLDS == WORLDS
    with pytest.raises(ValueError, match="unknown world"):
        sample_scene(np.random.default_rng(0), world="poor")
