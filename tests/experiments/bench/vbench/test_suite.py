"""VBench's own prompts and the names of their videos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from erta.errors import ErtaError
from experiments.bench.vbench import dimensions, suite
from tests.experiments.bench.vbench.suites import LONG, package_info, suite_of

# ---- prompts, names, seeds


def test_suite_holds_what_the_dimensions_need():
    whole = suite_of("all")
    assert (len(whole.entries), len(whole.texts), whole.is_whole) == (946, 944, True)
    prompts = whole.prompts(seed=0)
    assert len(prompts) == 5 * 944 == len({prompt.clip for prompt in prompts}) == len({p.seed for p in prompts})
    assert prompts[944].text == prompts[0].text and prompts[944].clip == f"{prompts[0].text}-1.mp4"
    assert len(suite_of(["temporal_flickering"]).texts) == 75
    assert len(suite_of(["subject_consistency", "dynamic_degree", "scene"]).texts) == 72 + 86
    # a text that stands there twice is generated once and scored for both of its entries
    twice = "The bund Shanghai, oil painting"
    for name in ("appearance_style", "imaging_quality"):
        (entry,) = [entry for entry in whole.manifest(name) if entry["prompt_en"] == twice]
        assert entry["videos"] == [f"{twice}-{index}.mp4" for index in range(5)]
    few = suite_of(["color", "scene"], limit=2, videos=1)
    assert len(few.texts) == 4 and not few.is_whole and [len(few.manifest(n)) for n in ("color", "scene")] == [2, 2]


def test_a_video_has_its_own_seed_whatever_else_is_run():
    def seeds(suite, seed=0):
        return {prompt.clip: prompt.seed for prompt in suite.prompts(seed)}

    whole, part = seeds(suite_of("all")), seeds(suite_of(["color"], limit=3, videos=2))
    assert len(part) == 6 and part.items() <= whole.items()
    assert not part.items() & seeds(suite_of(["color"]), seed=1).items()


def test_names_that_no_file_can_have():
    assert suite.video_name("a cat", 3) == "a cat-3.mp4"
    exact = "x" * (255 - len("-0.mp4"))
    assert suite.video_name(exact, 0) == f"{exact}-0.mp4"
    awkward = [LONG, LONG + "er", exact + "x", "ü" * 200, "a/b", "a b"]
    names = [suite.video_name(prompt, 12) for prompt in awkward]
    assert len(set(names)) == len(awkward) and all(len(name.encode()) <= 255 for name in names)
    assert all(name.endswith("-12.mp4") and "/" not in name for name in names)
    assert names[0].startswith("a long prompt, très très") and names[4].startswith("a b_")


@pytest.mark.slow
def test_the_package_lists_the_same_videos_and_dimensions(tmp_path):
    """Oracle: VBench's own search by name in a folder of our names finds for each entry what we list for it, and
    it has the same dimensions and refuses the same ones for other prompts."""
    suite, videos = suite_of(["temporal_flickering", "appearance_style"]), tmp_path / "videos"
    videos.mkdir()
    for prompt in suite.prompts(0):
        (videos / prompt.clip).touch()
    code = (
        "import sys, json, vbench\n"
        "bench = vbench.VBench('cpu', sys.argv[1], sys.argv[2])\n"
        "bench.build_full_info_json(sys.argv[3], 'own', ['temporal_flickering', 'appearance_style'])\n"
        "any_prompt = {}\n"
        "for name in bench.build_full_dimension_list():\n"
        "    try: bench.check_dimension_requires_extra_info([name])\n"
        "    except AssertionError: any_prompt[name] = False\n"
        "    else: any_prompt[name] = True\n"
        "print(json.dumps(any_prompt))\n"
    )
    out = [str(package_info()), str(tmp_path), str(videos)]
    done = subprocess.run([sys.executable, "-c", code, *out], capture_output=True, text=True, check=True)
    assert "WARNING" not in done.stdout
    own = json.loads((tmp_path / "own_full_info.json").read_text())
    listed = [entry for name in ("temporal_flickering", "appearance_style") for entry in suite.manifest(name)]
    assert len(own) == len(listed) == 75 + 90
    by_key = {(entry["prompt_en"], *entry["dimension"]): entry["videos"] for entry in listed}
    for entry in own:
        assert [Path(path).name for path in entry["video_list"]] == by_key[entry["prompt_en"], *entry["dimension"]]
    any_prompt = {name: dimension.any_prompt for name, dimension in dimensions.DIMENSIONS.items()}
    assert json.loads(done.stdout.splitlines()[-1]) == any_prompt


def test_missing_videos_are_named_before_the_worker_starts(tmp_path):
    for arm in ("uncached", "cached"):
        (tmp_path / arm).mkdir()
        for name in ("a-0.mp4", "b-0.mp4"):
            (tmp_path / arm / name).write_bytes(b"x")
    folders = [tmp_path / "uncached", tmp_path / "cached"]
    suite.check_complete(folders, ["a-0.mp4", "b-0.mp4"])
    (tmp_path / "cached" / "b-0.mp4").write_bytes(b"")
    with pytest.raises(ErtaError, match=r"1 of 4 videos are missing.*cached/b-0\.mp4"):
        suite.check_complete(folders, ["a-0.mp4", "b-0.mp4"])
