"""VBench: the suite's prompts and names, scores by hand, the package itself in its worker, and every bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from erta.errors import ErtaError
from experiments.bench.vbench import evaluation, suite
from experiments.harness import pair
from experiments.output import clips
from experiments.output.files import read_lines
from tests import commands
from tests.experiments.bench.vbench.suites import ENTRIES, LONG
from tests.experiments.bench.vbench.test_scores import MADE_UP

SUITE = ("bench=vbench_standard", "model.embedded=false", "cache=uniform", "bench.num_prompts=null")
FLICKER = (*SUITE, "bench.dimensions=temporal_flickering", "bench.videos_per_prompt=1")


@pytest.fixture
def small_suite(tmp_path, monkeypatch):
    """Four entries in place of the package's 946."""
    info = tmp_path / "info.json"
    info.write_text(json.dumps(ENTRIES))
    monkeypatch.setattr(evaluation, "find_info", lambda python: info)
    return info


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
    samples = {arm: tmp_path / arm for arm in pair.ARMS}
    for folder in samples.values():
        folder.mkdir()
        for name in ("a-0.mp4", "b-0.mp4"):
            (folder / name).write_bytes(b"x")
    pair_of_prompts = suite.Suite([], ["a", "b"], is_whole=True, videos_per_prompt=1)
    made = evaluation.Evaluation(list(MADE_UP), None, pair_of_prompts, has_package=True)
    made.score(samples, {"a-0.mp4": "a", "b-0.mp4": "b"}, tmp_path)
    metrics, missing = made.summarise()
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

    partial = suite.Suite([], ["a", "b"], is_whole=False, videos_per_prompt=1)
    made = evaluation.Evaluation(list(MADE_UP), None, partial, has_package=True, scores=made.scores)
    metrics, missing = made.summarise()
    assert "vbench_total" not in metrics and "leaves out" in missing["vbench_total"]


# ---- the command


@pytest.mark.slow
def test_standard_suite(command, tmp_path, small_suite, monkeypatch):
    """Generated, interrupted in the middle, gone on with, scored by the package, written down."""
    write, calls = clips.write_lossless, []

    def full(frames, path, fps):
        calls.append(path.name)
        if len(calls) == 8:
            raise OSError(28, "No space left on device", str(path))
        write(frames, path, fps)

    arguments = (*SUITE, "bench.dimensions=[temporal_flickering,scene,color]", "bench.videos_per_prompt=2")
    monkeypatch.setattr(clips, "write_lossless", full)
    code, printed = command(*arguments)
    assert code == 1 and "the disk is full" in printed and "Traceback" not in printed, printed
    assert "6 videos an arm for 3 dimensions, of which 1 can be evaluated" in printed
    (folder,) = commands.folders(tmp_path)
    kept = (folder / "per_prompt.jsonl").read_text()
    assert kept.count("\n") == 3
    monkeypatch.setattr(clips, "write_lossless", write)
    code, printed = command(*arguments)
    assert code == 0 and "3 of 6 prompts are done" in printed and commands.folders(tmp_path) == [folder], printed
    assert (folder / "per_prompt.jsonl").read_text().startswith(kept)

    names = {suite.video_name(text, k) for text in ("a red circle", "a blue star", LONG) for k in (0, 1)}
    for arm in pair.ARMS:
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
    assert record["seeds"][:3] == [suite.video_seed(0, p, 0) for p in ("a red circle", "a blue star", LONG)]
    assert "cached - uncached, 6 videos" in printed


@pytest.mark.slow
def test_damaged_and_lost_videos(command, tmp_path, small_suite, monkeypatch):
    """A damaged clip and a lost one come back bit for bit. Mutant: a file that is there taken for a clip."""

    def interrupted(*args):
        raise KeyboardInterrupt

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "failed_imports", lambda *args: {})
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    assert command(*FLICKER)[0] == 130
    (folder,) = commands.folders(tmp_path)
    damaged, lost = sorted((folder / "samples" / "cached").glob("*.mp4"))[:2]
    before, rows = [path.read_bytes() for path in (damaged, lost)], (folder / "per_prompt.jsonl").read_text()
    damaged.write_bytes(b"\0" * 500)
    lost.unlink()
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    code, printed = command(*FLICKER)
    assert code == 0 and [path.read_bytes() for path in (damaged, lost)] == before, printed
    assert (folder / "per_prompt.jsonl").read_text() == rows and commands.folders(tmp_path) == [folder]


@pytest.mark.slow
def test_finished_dimensions_are_not_scored_again(command, tmp_path, small_suite, monkeypatch):
    append, scored = evaluation.append_line, []

    def evaluate(dimension, arms, names, python, entries):
        scored.append(dimension)
        if dimension == "scene":
            raise ErtaError("the VBench worker failed: out of memory")
        return {arm: {"score": 0.5, "per_video": dict.fromkeys(names, 0.5)} for arm in arms}

    def full(path, row):
        if row["dimension"] == "color":
            raise OSError(28, "No space left on device", str(path))
        append(path, row)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "why_not", lambda *args: {})
    monkeypatch.setattr(evaluation, "failed_imports", lambda *args: {})
    monkeypatch.setattr(evaluation, "append_line", full)
    arguments = (*SUITE, "bench.dimensions=[temporal_flickering,scene,color]", "bench.videos_per_prompt=1")
    code, printed = command(*arguments)
    assert code == 1 and "the disk is full" in printed and scored == ["temporal_flickering", "scene", "color"]
    monkeypatch.setattr(evaluation, "append_line", append)
    code, printed = command(*arguments)
    assert code == 0 and scored[3:] == ["scene", "color"], printed
    (folder,) = commands.folders(tmp_path)
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
    "no number of custom prompts": (
        ["bench=vbench", "bench.num_prompts=null"],
        "num_prompts must be a number, at least 1",
        1,
    ),
    "zero prompts": (["bench.num_prompts=0"], "num_prompts must be at least 1", 1),
    "its own prompts": (["bench.prompts=p.txt"], "has its own prompts", 1),
    "images": (["model=flux_tiny", "model.num_frames=null"], "makes images", 1),
    "a table": (["experiment=decomposition"], "does not evaluate bench=vbench_standard: it takes bench=fidelity", 1),
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
    monkeypatch.setattr(evaluation, "find_info", lambda python: None)
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
