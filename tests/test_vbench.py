"""VBench: the suite's prompts and names, scores by hand, the package itself in its worker, and every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from erta.errors import ErtaError
from experiments import main_job, vbench_dimensions, vbench_job, vbench_runner, vbench_scores, vbench_suite
from experiments.record import read_lines
from experiments.scenes import render, sample_scene
from tests import test_cli

command, weights = test_cli.command, test_cli.weights  # fixtures
LONG = "a long prompt, " + "très " * 60 + "long"  # 380 bytes: no file can be named after it
ENTRIES = [
    {"prompt_en": "a red circle", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a blue star", "dimension": ["color"], "auxiliary_info": {"color": {"color": "blue"}}},
    {"prompt_en": LONG, "dimension": ["temporal_flickering", "scene"]},
    {"prompt_en": "a blue star", "dimension": ["temporal_flickering"]},
]
SUITE = ("bench=vbench_standard", "model.embedded=false", "cache=uniform", "bench.num_prompts=null")
FLICKER = (*SUITE, "bench.dimensions=temporal_flickering", "bench.videos_per_prompt=1")


def clip(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render(sample_scene(rng), rng)


def package_info() -> Path:
    return vbench_runner.find_info(None)


def suite_of(dimensions, limit=None, videos=5) -> vbench_suite.Suite:
    from omegaconf import OmegaConf

    bench = {"dimensions": dimensions, "num_prompts": limit, "videos_per_prompt": videos}
    return vbench_suite.load_suite(OmegaConf.create({"bench": bench}), package_info())


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """Four entries in place of the package's 946."""
    info = tmp_path / "info.json"
    info.write_text(json.dumps(ENTRIES))
    monkeypatch.setattr(vbench_job, "find_info", lambda python: info)
    return info


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
    assert vbench_suite.video_name("a cat", 3) == "a cat-3.mp4"
    exact = "x" * (255 - len("-0.mp4"))
    assert vbench_suite.video_name(exact, 0) == f"{exact}-0.mp4"
    awkward = [LONG, LONG + "er", exact + "x", "ü" * 200, "a/b", "a b"]
    names = [vbench_suite.video_name(prompt, 12) for prompt in awkward]
    assert len(set(names)) == len(awkward) and all(len(name.encode()) <= 255 for name in names)
    assert all(name.endswith("-12.mp4") and "/" not in name for name in names)
    assert names[0].startswith("a long prompt, très très") and names[4].startswith("a b_")


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
    any_prompt = {name: dimension.any_prompt for name, dimension in vbench_dimensions.DIMENSIONS.items()}
    assert json.loads(done.stdout.splitlines()[-1]) == any_prompt


def test_missing_videos_are_named_before_the_worker_starts(tmp_path):
    for arm in ("uncached", "cached"):
        (tmp_path / arm).mkdir()
        for name in ("a-0.mp4", "b-0.mp4"):
            (tmp_path / arm / name).write_bytes(b"x")
    folders = [tmp_path / "uncached", tmp_path / "cached"]
    vbench_suite.check_complete(folders, ["a-0.mp4", "b-0.mp4"])
    (tmp_path / "cached" / "b-0.mp4").write_bytes(b"")
    with pytest.raises(ErtaError, match=r"1 of 4 videos are missing.*cached/b-0\.mp4"):
        vbench_suite.check_complete(folders, ["a-0.mp4", "b-0.mp4"])


# ---- scores

MADE_UP = {  # raw score → normalised by hand
    "subject_consistency": 0.31696,  # (0.31696 - 0.1462) / 0.8538 = 0.2
    "background_consistency": 0.5569,  # (0.5569 - 0.2615) / 0.7385 = 0.4
    "temporal_flickering": 0.85172,  # (0.85172 - 0.6293) / 0.3707 = 0.6
    "motion_smoothness": 0.9392,  # (0.9392 - 0.706) / 0.2915 = 0.8
    "dynamic_degree": 0.4,  # weight 0.5: 0.2
    "aesthetic_quality": 0.55,
    "imaging_quality": 0.65,
    "object_class": 0.9,
    "multiple_objects": 0.5,
    "human_action": 0.8,
    "color": 0.7,
    "spatial_relationship": 0.6,
    "scene": 0.4111,  # / 0.8222 = 0.5
    "appearance_style": 0.07205,  # (0.07205 - 0.0009) / 0.2846 = 0.25
    "temporal_style": 0.091,  # / 0.364 = 0.25
    "overall_consistency": 0.273,  # / 0.364 = 0.75
}


def test_scores_by_hand():
    scores, missing = vbench_scores.aggregate(MADE_UP)
    # quality: (0.2 + 0.4 + 0.6 + 0.8 + 0.2 + 0.55 + 0.65) / 6.5 = 3.4 / 6.5
    assert scores["vbench_quality"] == pytest.approx(0.5230769231, abs=1e-9)
    # semantic: (0.9 + 0.5 + 0.8 + 0.7 + 0.6 + 0.5 + 0.25 + 0.25 + 0.75) / 9 = 5.25 / 9
    assert scores["vbench_semantic"] == pytest.approx(0.5833333333, abs=1e-9)
    # total: (4 * 0.5230769231 + 0.5833333333) / 5 = 2.6756410256 / 5
    assert scores["vbench_total"] == pytest.approx(0.5351282051, abs=1e-9)
    assert missing == {} and set(MADE_UP) == set(vbench_dimensions.DIMENSIONS)


def test_no_total_while_a_dimension_is_missing():
    part = {name: value for name, value in MADE_UP.items() if name not in ("scene", "color")}
    scores, missing = vbench_scores.aggregate(part)
    assert list(scores) == ["vbench_quality"]
    assert missing["vbench_total"].endswith("color, scene") and missing["vbench_semantic"].endswith("color, scene")
    assert "vbench_quality" in vbench_scores.aggregate({"color": 1.0})[1]


def test_a_made_up_results_file_becomes_the_record(tmp_path):
    """Both arms of sixteen dimensions: cached lies 0.01 below uncached in one video of each and 0.03 in the other."""
    rows = []
    for name, raw in MADE_UP.items():
        uncached, cached = {"a-0.mp4": 0.5, "b-0.mp4": 0.5}, {"a-0.mp4": 0.49, "b-0.mp4": 0.47}
        if name == "color":  # the object was found in one video only, of the cached arm
            del cached["a-0.mp4"]
        arms = {"uncached": {"score": raw, "per_video": uncached}, "cached": {"score": 0.0, "per_video": cached}}
        rows.append({"dimension": name, **arms})
    (tmp_path / "vbench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = {arm: tmp_path / arm for arm in main_job.ARMS}
    for folder in samples.values():
        folder.mkdir()
        for name in ("a-0.mp4", "b-0.mp4"):
            (folder / name).write_bytes(b"x")
    suite = vbench_suite.Suite([], ["a", "b"], is_whole=True, videos_per_prompt=1)
    evaluation = vbench_job.Evaluation(list(MADE_UP), None, suite, has_package=True)
    evaluation.score(samples, {"a-0.mp4": "a", "b-0.mp4": "b"}, tmp_path)
    metrics, missing = evaluation.summarise()
    assert missing == {} and metrics["vbench_uncached"] == MADE_UP
    assert metrics["vbench_total_uncached"] == pytest.approx(0.5351282051, abs=1e-9)
    # all raw scores 0. Quality: -0.1462/0.8538 - 0.2615/0.7385 - 0.6293/0.3707 - 0.706/0.2915
    #   = -0.1712345 - 0.3540961 - 1.6975991 - 2.4219554 = -4.6448851; / 6.5 = -0.7145977
    # semantic: -0.0009/0.2846 = -0.0031623; / 9 = -0.0003514; total: (-2.8583908 - 0.0003514) / 5
    assert metrics["vbench_total"] == pytest.approx(-0.5717484, abs=1e-6)
    difference = metrics["vbench_difference"]["scene"]
    assert difference["mean"] == pytest.approx(-0.02) and difference["videos"] == 2
    assert (difference["low"], difference["high"]) == (pytest.approx(-0.03), pytest.approx(-0.01))
    assert metrics["vbench_difference"]["color"]["mean"] == pytest.approx(-0.03)
    assert metrics["vbench_difference"]["color"]["videos"] == 1

    partial = vbench_suite.Suite([], ["a", "b"], is_whole=False, videos_per_prompt=1)
    evaluation = vbench_job.Evaluation(list(MADE_UP), None, partial, has_package=True, scores=evaluation.scores)
    metrics, missing = evaluation.summarise()
    assert "vbench_total" not in metrics and "leaves out" in missing["vbench_total"]


# ---- dimensions


def test_dimensions_by_name_and_all():
    assert len(vbench_dimensions.requested("all")) == 16 == len(vbench_dimensions.requested(["color", "all"]))
    assert vbench_dimensions.requested("color") == ["color"]
    assert vbench_dimensions.requested(["scene", "color", "scene"]) == ["scene", "color"]
    for wrong in ("beauty", ["color", "beauty"], 5):
        with pytest.raises(ErtaError, match=r"no dimension (beauty|5)\.\nChoose from subject_consistency,"):
            vbench_dimensions.requested(wrong)


def test_missing_files_and_modules_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reasons = vbench_dimensions.why_not(list(vbench_dimensions.DIMENSIONS), "standard", {"scene": "no fairscale"})
    assert list(vbench_dimensions.DIMENSIONS.keys() - reasons.keys()) == ["temporal_flickering"]
    assert str(tmp_path / "amt_model" / "amt-s.pth") in reasons["motion_smoothness"]
    assert "vocab.txt" in reasons["scene"] and reasons["scene"].endswith("; no fairscale")

    # some of the files: what is complete can be evaluated, the rest is named file by file
    for file in ("clip_model/ViT-L-14.pt", "clip_model/ViT-B-32.pt", *vbench_dimensions.DIMENSIONS["color"].weights):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"weights")
    raft = tmp_path / "raft_model" / "models" / "raft-things.pth"
    raft.parent.mkdir(parents=True)
    raft.touch()  # what a download leaves that a full disk ended
    names = ["background_consistency", "appearance_style", "aesthetic_quality", "color", "dynamic_degree"]
    reasons = vbench_dimensions.why_not(names, "standard", {})
    assert set(reasons) == {"aesthetic_quality", "color", "dynamic_degree"} and str(raft) in reasons["dynamic_degree"]
    assert "ViT-L-14" not in reasons["aesthetic_quality"] and "sa_0_4_vit_l_14_linear" in reasons["aesthetic_quality"]
    vocabulary = tmp_path / "hub" / "models--bert-base-uncased" / "snapshots" / "abc" / "vocab.txt"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text("[PAD]")
    assert vbench_dimensions.why_not(["color"], "standard", {}) == {}
    refused = {
        name: why for name, why in vbench_dimensions.why_not(names, "custom", {}).items() if "own prompts" in why
    }
    assert set(refused) == {"appearance_style", "color"} and "bench=vbench_standard" in refused["color"]


# ---- the worker


def test_temporal_flickering_through_the_worker_equals_its_formula(tmp_path):
    """VBench's own code in its own process, against 1 - mean |frame difference| computed here, in both modes."""
    names = [vbench_suite.video_name(entry["prompt_en"], 0) for entry in ENTRIES[:3]]
    arms = {"uncached": tmp_path / "u", "cached": tmp_path / "c"}
    wanted: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    for offset, (arm, folder) in enumerate(arms.items()):
        folder.mkdir()
        for k, name in enumerate(names):
            frames = clip(10 * offset + k)
            vbench_runner.write_lossless(frames, folder / name)
            changes = np.abs(np.diff(vbench_runner.to_uint8(frames).astype(float), axis=0))
            wanted[arm][name] = 1 - changes.mean() / 255
    prompts = dict(zip(names, ["one", "two", "three"], strict=True))
    entries = [{**entry, "videos": [vbench_suite.video_name(entry["prompt_en"], 0)]} for entry in ENTRIES[::2]]
    custom = vbench_runner.evaluate("temporal_flickering", arms, prompts)
    listed = vbench_runner.evaluate("temporal_flickering", arms, prompts, entries=entries)
    for arm in arms:
        assert custom[arm]["per_video"] == pytest.approx(wanted[arm], abs=1e-6)
        assert listed[arm]["per_video"] == pytest.approx({n: wanted[arm][n] for n in names[::2]}, abs=1e-6)
        assert custom[arm]["score"] == pytest.approx(np.mean(list(wanted[arm].values())), abs=1e-6)

    (tmp_path / "c" / names[1]).write_bytes(b"not a video")
    with pytest.raises(vbench_runner.UnreadableVideoError, match=r"c/a blue star-0\.mp4 cannot be decoded\.\nDelete"):
        vbench_runner.evaluate("temporal_flickering", arms, prompts)


def test_worker_failure_is_one_line(tmp_path, monkeypatch):
    def failing(message):
        def run(*args, **kwargs):
            return subprocess.CompletedProcess(args, 1, "", f"Traceback\n{message}\n")

        return run

    monkeypatch.setattr(subprocess, "run", failing("RuntimeError: out of memory"))
    with pytest.raises(ErtaError, match="the VBench worker failed: RuntimeError: out of memory$"):
        vbench_runner.evaluate("temporal_flickering", {"cached": tmp_path}, {})
    monkeypatch.setattr(subprocess, "run", failing("OSError: [Errno 28] No space left on device: 'x.json'"))
    with pytest.raises(OSError, match="No space left"):
        vbench_runner.evaluate("temporal_flickering", {"cached": tmp_path}, {})


def test_lossless_clips_come_back_exactly(tmp_path):
    import cv2

    frames = clip(3)
    path = tmp_path / "a.mp4"
    vbench_runner.write_lossless(frames, path, fps=16)
    capture, read = cv2.VideoCapture(str(path)), []
    assert capture.get(cv2.CAP_PROP_FPS) == 16
    while (pair := capture.read())[0]:
        read.append(pair[1][..., ::-1])
    np.testing.assert_array_equal(np.stack(read), vbench_runner.to_uint8(frames))


def test_a_clip_that_a_full_disk_cut_off_is_an_error_and_no_file(tmp_path, monkeypatch):
    """The encoder returns as if all were well; the file lacks its index, or a part of its last box."""
    import imageio.v2

    path, whole = tmp_path / "a.mp4", tmp_path / "whole.mp4"
    vbench_runner.write_lossless(clip(), whole)
    content = whole.read_bytes()
    moov = content.index(b"moov") - 4
    free = [1 << 30]
    monkeypatch.setattr(vbench_runner.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free[0]}))
    for kept in (0, moov // 2, moov, len(content) - 1):
        monkeypatch.setattr(imageio.v2, "mimwrite", lambda *a, kept=kept, **k: path.write_bytes(content[:kept]))
        for free[0], message in ((1 << 30, "not written whole"), (0, "No space left")):
            with pytest.raises(OSError, match=message):
                vbench_runner.write_lossless(clip(), path)
            assert not path.exists()
    monkeypatch.setattr(imageio.v2, "mimwrite", lambda *a, **k: path.write_bytes(content))
    vbench_runner.write_lossless(clip(), path)
    assert path.read_bytes() == content


# ---- the command


def test_standard_suite(command, tmp_path, small_suite, monkeypatch):
    """Generated, interrupted in the middle, gone on with, scored by the package, written down."""
    write, calls = main_job.write_lossless, []

    def full(frames, path, fps):
        calls.append(path.name)
        if len(calls) == 8:
            raise OSError(28, "No space left on device", str(path))
        write(frames, path, fps)

    arguments = (*SUITE, "bench.dimensions=[temporal_flickering,scene,color]", "bench.videos_per_prompt=2")
    monkeypatch.setattr(main_job, "write_lossless", full)
    code, printed = command(*arguments)
    assert code == 1 and "the disk is full" in printed and "Traceback" not in printed, printed
    assert "6 videos an arm for 3 dimensions, of which 1 can be evaluated" in printed
    (folder,) = test_cli.folders(tmp_path)
    kept = (folder / "per_prompt.jsonl").read_text()
    assert kept.count("\n") == 3
    monkeypatch.setattr(main_job, "write_lossless", write)
    code, printed = command(*arguments)
    assert code == 0 and "3 of 6 prompts are done" in printed and test_cli.folders(tmp_path) == [folder], printed
    assert (folder / "per_prompt.jsonl").read_text().startswith(kept)

    names = {vbench_suite.video_name(text, k) for text in ("a red circle", "a blue star", LONG) for k in (0, 1)}
    for arm in main_job.ARMS:
        assert {path.name for path in (folder / "samples" / arm).glob("*.mp4")} == names
    record = json.loads((folder / "record.json").read_text())
    metrics, missing = record["metrics"], record["missing"]
    assert list(metrics["vbench"]) == ["temporal_flickering"] and 0.3 < metrics["vbench"]["temporal_flickering"] < 1
    assert metrics["vbench_difference"]["temporal_flickering"]["videos"] == 6
    assert missing["vbench.color"].endswith("; Python module not found: detectron2")
    assert "grit_b_densecap" in missing["vbench.color"], missing["vbench.color"]
    assert "tag2text" in missing["vbench.scene"]
    assert "scene" in missing["vbench_total"] and "vbench_total" not in metrics
    (row,) = read_lines(folder / "vbench.jsonl")
    assert set(row["cached"]["per_video"]) == names
    assert record["seeds"][:3] == [vbench_suite.video_seed(0, p, 0) for p in ("a red circle", "a blue star", LONG)]
    assert "cached - uncached, 6 videos" in printed


@pytest.mark.slow
def test_damaged_and_lost_videos(command, tmp_path, small_suite, monkeypatch):
    """A damaged clip is named, and when it is deleted it comes back bit for bit."""

    def interrupted(*args):
        raise KeyboardInterrupt

    evaluate = vbench_job.evaluate
    monkeypatch.setattr(vbench_job, "failed_imports", lambda *args: {})
    monkeypatch.setattr(vbench_job, "evaluate", interrupted)
    assert command(*FLICKER)[0] == 130
    (folder,) = test_cli.folders(tmp_path)
    victim = folder / "samples" / "cached" / "a blue star-0.mp4"
    content, rows = victim.read_bytes(), (folder / "per_prompt.jsonl").read_text()
    victim.write_bytes(b"\0" * 500)
    monkeypatch.setattr(vbench_job, "evaluate", evaluate)
    code, printed = command(*FLICKER)
    error = printed[printed.index("error:") :]
    assert code == 1 and "cached/a blue star-0.mp4 cannot be decoded" in error and len(error.strip().splitlines()) == 2
    victim.unlink()
    code, printed = command(*FLICKER)
    assert code == 0 and victim.read_bytes() == content, printed
    assert (folder / "per_prompt.jsonl").read_text() == rows and test_cli.folders(tmp_path) == [folder]


@pytest.mark.slow
def test_finished_dimensions_are_not_scored_again(command, tmp_path, small_suite, monkeypatch):
    append, scored = vbench_job.append_line, []

    def evaluate(dimension, arms, names, python, entries):
        scored.append(dimension)
        if dimension == "scene":
            raise ErtaError("the VBench worker failed: out of memory")
        return {arm: {"score": 0.5, "per_video": dict.fromkeys(names, 0.5)} for arm in arms}

    def full(path, row):
        if row["dimension"] == "color":
            raise OSError(28, "No space left on device", str(path))
        append(path, row)

    monkeypatch.setattr(vbench_job, "evaluate", evaluate)
    monkeypatch.setattr(vbench_job, "why_not", lambda *args: {})
    monkeypatch.setattr(vbench_job, "failed_imports", lambda *args: {})
    monkeypatch.setattr(vbench_job, "append_line", full)
    arguments = (*SUITE, "bench.dimensions=[temporal_flickering,scene,color]", "bench.videos_per_prompt=1")
    code, printed = command(*arguments)
    assert code == 1 and "the disk is full" in printed and scored == ["temporal_flickering", "scene", "color"]
    monkeypatch.setattr(vbench_job, "append_line", append)
    code, printed = command(*arguments)
    assert code == 0 and scored[3:] == ["scene", "color"], printed
    (folder,) = test_cli.folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["metrics"]["vbench"] == {"temporal_flickering": 0.5, "color": 0.5}
    assert record["missing"]["vbench.scene"] == "the VBench worker failed: out of memory"


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """An interpreter without any package."""
    path = tmp_path / "bare-python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


BAD = {
    "unknown dimension": (["bench.dimensions=beauty"], "VBench has no dimension beauty", 2),
    "unknown dimension in a list": (["bench=vbench", "bench.dimensions=[color,beauty]"], "no dimension beauty", 2),
    "unknown suite": (["bench=vbench", "bench.suite=gold"], "bench.suite must be one of custom, standard", 1),
    "no videos": (["bench.videos_per_prompt=0"], "videos_per_prompt must be at least 1", 1),
    "no dimensions": (["bench.dimensions=[]"], "bench.dimensions is empty", 1),
    "no number of custom prompts": (["bench=vbench", "bench.num_prompts=null"], "num_prompts must be at least 1", 1),
    "zero prompts": (["bench.num_prompts=0"], "num_prompts must be at least 1", 1),
    "its own prompts": (["bench.prompts=p.txt"], "has its own prompts", 1),
    "images": (["model.num_frames=null"], "makes images", 1),
    "a table": (["experiment=budgets"], "is for experiment=main", 1),
    "no interpreter": (["bench.python=nowhere/python"], "bench.python=nowhere/python is not an interpreter", 1),
    "not Python": (["bench.python=echo"], "bench.python=echo cannot run the worker", 1),
    "without vbench": (["bench.python={bare}"], "has no vbench package; `make vbench-env`", 1),
    "custom without vbench": (["bench=vbench", "bench.python={bare}"], "has no vbench package", 1),
    "weights folder": (["WEIGHTS=nowhere"], "VBENCH_CACHE_DIR=nowhere is not a folder", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_a_line_or_two(command, name, bare_python, monkeypatch):
    arguments, expected, lines = BAD[name]
    if arguments == ["WEIGHTS=nowhere"]:
        monkeypatch.setenv("VBENCH_CACHE_DIR", "nowhere")
        arguments = []
    base = [] if any(argument.startswith("bench=") for argument in arguments) else [*SUITE]
    base = [argument for argument in base if not argument.startswith(tuple(a.split("=")[0] + "=" for a in arguments))]
    code, printed = command(*base, *(argument.format(bare=bare_python) for argument in arguments))
    message = printed[printed.index("error:") :].strip()
    assert code == 1 and expected in message and "Traceback" not in printed
    assert len(message.splitlines()) == lines, message


def test_without_the_package_custom_prompts_go_unscored_and_the_suite_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.setattr(vbench_job, "find_info", lambda python: None)
    code, printed = command(*SUITE)
    assert code == 1 and "error: VBench's prompts come with its package, and the vbench package is not" in printed
    code, printed = command("cache=uniform", "bench.num_prompts=1", "bench.dimensions=[temporal_flickering,color]")
    assert code == 0 and printed.count("`make setup` installs it") == 2, printed


@pytest.mark.slow
def test_weights_folder_with_some_of_the_files(command, tmp_path, monkeypatch):
    """What is there is evaluated; the rest is listed with the files, and the run's own results are kept."""
    (tmp_path / "some" / "clip_model").mkdir(parents=True)
    (tmp_path / "some" / "clip_model" / "ViT-L-14.pt").write_bytes(b"weights")
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "some"))
    arguments = "bench.dimensions=[temporal_flickering,aesthetic_quality,color]"
    code, printed = command("bench=vbench", "cache=uniform", "bench.num_prompts=2", arguments)
    assert code == 0 and "VBench temporal_flickering" in printed, printed
    linear = tmp_path / "some" / "aesthetic_model" / "emb_reader" / "sa_0_4_vit_l_14_linear.pth"
    line = next(line for line in printed.splitlines() if "vbench.aesthetic_quality" in line)
    assert str(linear) in line and "ViT-L-14.pt" not in line
    assert "vbench.color (needs VBench's own prompts: bench=vbench_standard)" in printed


# ---- plumbing only: the package's code runs to its end on weights of the right shapes that were never trained


def _raft(folder: Path) -> str:
    return (
        "from easydict import EasyDict\n"
        "from vbench.third_party.RAFT.core.raft import RAFT\n"
        "net = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))\n"
        "state = {'module.' + key: value for key, value in net.state_dict().items()}\n"
        f"torch.save(state, {str(folder / 'raft_model' / 'models' / 'raft-things.pth')!r})\n"
    )


def _amt(folder: Path) -> str:
    return (
        "import os, vbench\n"
        "from omegaconf import OmegaConf\n"
        "from vbench.third_party.amt.utils.build_utils import build_from_cfg\n"
        "path = os.path.join(os.path.dirname(vbench.__file__), 'third_party/amt/cfgs/AMT-S.yaml')\n"
        "net = build_from_cfg(OmegaConf.load(path).network)\n"
        f"torch.save({{'state_dict': net.state_dict()}}, {str(folder / 'amt_model' / 'amt-s.pth')!r})\n"
    )


def _dino(folder: Path) -> str:
    """A stand-in for DINO's hub code with its calling convention, which loads the weights from torch's cache."""
    hub = folder / "dino_model" / "facebookresearch_dino_main" / "hubconf.py"
    hub.parent.mkdir(parents=True)
    hub.write_text(
        "import torch\n"
        "def dino_vitb16(pretrained=True, **kwargs):\n"
        "    net = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.LazyLinear(8))\n"
        "    net(torch.zeros(1, 3, 224, 224))\n"
        "    url = 'https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth'\n"
        "    net.load_state_dict(torch.hub.load_state_dict_from_url(url=url, map_location='cpu'))\n"
        "    return net\n"
    )
    return (
        "net = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.LazyLinear(8))\n"
        "net(torch.zeros(1, 3, 224, 224))\n"
        f"torch.save(net.state_dict(), {str(folder / 'dino_model' / 'dino_vitbase16_pretrain.pth')!r})\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "weights_code"),
    [("dynamic_degree", _raft), ("motion_smoothness", _amt), ("subject_consistency", _dino)],
)
def test_plumbing_only_with_untrained_stand_in_weights(tmp_path, monkeypatch, dimension, weights_code):
    """The files are found where they are looked for, and the worker returns one finite score a video."""
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    for file in vbench_dimensions.DIMENSIONS[dimension].weights:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if dimension == "subject_consistency":
        (tmp_path / "dino_model" / "facebookresearch_dino_main").rmdir()
    assert vbench_dimensions.missing_files(dimension)
    code = "import torch\ntorch.manual_seed(0)\n" + weights_code(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert vbench_dimensions.missing_files(dimension) == []
    arms = {"uncached": tmp_path / "u", "cached": tmp_path / "c"}
    frames = clip().repeat(2, axis=1).repeat(2, axis=2)  # RAFT needs 128 pixels
    for folder in arms.values():
        folder.mkdir()
        for k in range(2):
            vbench_runner.write_lossless(frames[: 5 + k], folder / f"{k:03d}.mp4")
    found = vbench_runner.evaluate(dimension, arms, {"000.mp4": "a", "001.mp4": "b"})
    assert found["cached"] == found["uncached"] and set(found["cached"]["per_video"]) == {"000.mp4", "001.mp4"}
    assert all(0 <= value <= 1 for value in found["cached"]["per_video"].values())
    mean = np.mean(list(found["cached"]["per_video"].values()))
    assert found["cached"]["score"] == pytest.approx(mean, abs=0.05)
