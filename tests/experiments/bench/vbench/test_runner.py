"""The worker process, and the package's code on stand-in weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from erta.errors import ErtaError
from experiments.bench.vbench import dimensions, runner, suite
from experiments.output import clips
from experiments.scenes import render, sample_scene
from tests.experiments.bench.vbench.suites import ENTRIES


def clip(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render(sample_scene(rng), rng)


# ---- the worker


@pytest.mark.slow
def test_temporal_flickering_through_the_worker_equals_its_formula(tmp_path):
    """VBench's own code in its own process, against 1 - mean |frame difference| computed here, in both modes."""
    names = [suite.video_name(entry["prompt_en"], 0) for entry in ENTRIES[:3]]
    arms = {"uncached": tmp_path / "u", "cached": tmp_path / "c"}
    wanted: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    for offset, (arm, folder) in enumerate(arms.items()):
        folder.mkdir()
        for k, name in enumerate(names):
            frames = clip(10 * offset + k)
            clips.write_lossless(frames, folder / name)
            changes = np.abs(np.diff(clips.to_uint8(frames).astype(float), axis=0))
            wanted[arm][name] = 1 - changes.mean() / 255
    prompts = dict(zip(names, ["one", "two", "three"], strict=True))
    entries = [{**entry, "videos": [suite.video_name(entry["prompt_en"], 0)]} for entry in ENTRIES[::2]]
    custom = runner.evaluate("temporal_flickering", arms, prompts)
    listed = runner.evaluate("temporal_flickering", arms, prompts, entries=entries)
    for arm in arms:
        assert custom[arm]["per_video"] == pytest.approx(wanted[arm], abs=1e-6)
        assert listed[arm]["per_video"] == pytest.approx({n: wanted[arm][n] for n in names[::2]}, abs=1e-6)
        assert custom[arm]["score"] == pytest.approx(np.mean(list(wanted[arm].values())), abs=1e-6)

    (tmp_path / "c" / names[1]).write_bytes(b"not a video")
    with pytest.raises(runner.UnreadableVideoError, match=r"c/a blue star-0\.mp4 cannot be decoded\.\nDelete"):
        runner.evaluate("temporal_flickering", arms, prompts)


def test_worker_failure_is_one_line(tmp_path, monkeypatch):
    def failing(message):
        def run(*args, **kwargs):
            return subprocess.CompletedProcess(args, 1, "", f"Traceback\n{message}\n")

        return run

    monkeypatch.setattr(subprocess, "run", failing("RuntimeError: out of memory"))
    with pytest.raises(ErtaError, match="the VBench worker failed: RuntimeError: out of memory$"):
        runner.evaluate("temporal_flickering", {"cached": tmp_path}, {})
    monkeypatch.setattr(subprocess, "run", failing("OSError: [Errno 28] No space left on device: 'x.json'"))
    with pytest.raises(OSError, match="No space left"):
        runner.evaluate("temporal_flickering", {"cached": tmp_path}, {})


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
    for file in dimensions.DIMENSIONS[dimension].weights:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if dimension == "subject_consistency":
        (tmp_path / "dino_model" / "facebookresearch_dino_main").rmdir()
    assert dimensions.missing_files(dimension)
    code = "import torch\ntorch.manual_seed(0)\n" + weights_code(tmp_path)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert dimensions.missing_files(dimension) == []
    arms = {"uncached": tmp_path / "u", "cached": tmp_path / "c"}
    frames = clip().repeat(2, axis=1).repeat(2, axis=2)  # RAFT needs 128 pixels
    for folder in arms.values():
        folder.mkdir()
        for k in range(2):
            clips.write_lossless(frames[: 5 + k], folder / f"{k:03d}.mp4")
    found = runner.evaluate(dimension, arms, {"000.mp4": "a", "001.mp4": "b"})
    assert found["cached"] == found["uncached"] and set(found["cached"]["per_video"]) == {"000.mp4", "001.mp4"}
    assert all(0 <= value <= 1 for value in found["cached"]["per_video"].values())
    mean = np.mean(list(found["cached"]["per_video"].values()))
    assert found["cached"]["score"] == pytest.approx(mean, abs=0.05)
