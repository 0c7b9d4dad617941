"""The command line: the main job on an untrained tiny pipeline, and every bad input that people type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BAD = {
    "unknown group": (["kache=none"], "unknown key kache: did you mean cache?"),
    "unknown choice": (["cache=magic"], "there is no cache=magic. Choose from adams_bashforth, budcache"),
    "unknown key": (["cache.treshold=0.1"], "did you mean cache.threshold?"),
    "added key": (["+cache.treshold=0.1"], "cannot be added"),
    "embedded without weights": (["model.name=mine", "model.path=null"], "experiment=train_tiny model=mine"),
    "unknown site": (["cache.site=middle"], "cache.site must be one of output, blocks"),
    "unknown rectifier": (["cache.rectifier=matrix"], "rectifier must be one of channel, scalar"),
    "velocity at the blocks": (["cache=policy", "cache.site=blocks", "cache.reuse=velocity"], "use site=output"),
    "not a number": (["cache.threshold=abc"], "could not be converted to Float"),
    "negative threshold": (["cache.threshold=-1"], "must be ≥ 0"),
    "two budgets": (["cache.threshold=0.1", "cache.steps=3"], "two budgets"),
    "impossible speed-up": (["cache.speedup=100"], "largest is 6"),
    "speed-up below one": (["cache.speedup=0.5"], "≥ 1"),
    "more steps than exist": (["cache.steps=7"], "between 1 and"),
    "no step": (["cache.steps=0"], "at least 1, not 0"),
    "zero inference steps": (["model.num_inference_steps=0"], "at least 2"),
    "one inference step": (["model.num_inference_steps=1"], "at least 2"),
    "zero prompts": (["bench.num_prompts=0"], "at least 1"),
    "zero calibration prompts": (["calibration.num_prompts=0"], "at least 1"),
    "unknown device type": (["model.dtype=int8"], "one of float32"),
    "unknown dimension": (["bench.dimensions=[beauty]"], "beauty"),
    "threshold without a threshold rule": (["cache=fewer_steps", "cache.threshold=0.1"], "no threshold"),
    "missing calibration": (["calibration.path=nowhere.safetensors"], "cannot read a calibration"),
    "missing folder": (["model.path=nowhere"], "is not a folder"),
    "missing prompt file": (["bench.prompts=nowhere.txt"], "cannot read the prompts"),
    "unknown frames": (["bench.frames_from=gif"], "bench.frames_from must be one of decoded, mp4"),
    "mp4 of images": (["bench.frames_from=mp4", "model=flux_tiny", "model.num_frames=null"], "is for videos"),
    "mp4 of odd sizes": (["model.width=40"], "model.width must be a multiple of 16"),
    "train something else": (["experiment=train_tiny", "model=wan21"], "embedded"),
    "another world": (["model.world=rich"], "these weights were trained on the plain world"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_a_line_or_two(command, name):
    arguments, expected = BAD[name]
    code, printed = command(*arguments)
    message = printed[printed.index("error:") :].strip()
    assert code == 1 and expected in message and "Traceback" not in printed
    assert len(message.splitlines()) <= 3, message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["experiment=regimes", "model=flux_tiny", "regimes.dial=true_cfg_scale", "regimes.guidances=[0.5]"],
            "true guidance is at least 1",
        ),
        (["experiment=speed", "model.true_cfg_scale=4"], "WanPipeline knows no true guidance"),
    ],
)
def test_true_guidance_where_there_is_none(command, arguments, expected):
    code, printed = command(*arguments, quick=False)
    assert code == 1 and expected in printed


def test_word_outside_the_vocabulary_and_bad_prompt_files(command):
    Path("p.txt").write_text("a red zebra moving left\n" * 3)
    code, printed = command("bench.prompts=p.txt")
    assert code == 1 and "'zebra'" in printed and "checkered" in printed
    Path("p.txt").write_text("a red circle\n\na blue star\n")
    assert "line 2 is empty" in command("bench.prompts=p.txt")[1]
    Path("p.txt").write_bytes(b"caf\xe9\n" * 3)
    assert "not UTF-8" in command("bench.prompts=p.txt")[1]
    Path("p.txt").write_text("a red circle\n")
    assert "bench.num_prompts=3, but p.txt holds only 1" in command("bench.prompts=p.txt")[1]


def test_an_interrupt_that_python_would_forget_comes_again():
    """Ctrl-C inside a finalizer. Mutant: Python's own hook, which prints a traceback, and the command goes on to its end."""
    lost = "import run, time\nclass Kept:\n def __del__(self): raise KeyboardInterrupt\nKept()\ntime.sleep(60)"
    ended = subprocess.run([sys.executable, "-c", lost], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert "Exception ignored" not in ended.stderr and ended.stderr.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["kache=none"], ["cache.site=middle"], ["bench.num_prompts=0"]]
)
def test_what_needs_no_model_is_answered_without_torch(arguments, tmp_path):
    """It takes seconds to load. Mutant: the configuration's module imports `erta.plan`."""
    command = [sys.executable, "-X", "importtime", ROOT / "run.py", *arguments]
    loaded = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr
    names = {line.rpartition("|")[2].strip() for line in loaded.splitlines() if line.startswith("import time:")}
    assert "experiments.harness.checks" in names and not {"torch", "diffusers", "transformers"} & names
