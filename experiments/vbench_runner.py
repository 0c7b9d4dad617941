"""VBench on finished clips: the real package, in a worker process, with what is missing named beforehand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from erta.errors import ErtaError

# dimension → weight files under $VBENCH_CACHE_DIR (default ~/.cache/vbench), as vbench 0.1.5 names them
WEIGHTS = {
    "temporal_flickering": [],
    "subject_consistency": ["dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main"],
    "background_consistency": ["clip_model/ViT-B-32.pt"],
    "motion_smoothness": ["amt_model/amt-s.pth"],
    "dynamic_degree": ["raft_model/models/raft-things.pth"],
    "aesthetic_quality": ["clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"],
    "imaging_quality": ["pyiqa_model/musiq_spaq_ckpt-358bb6af.pth"],
    "temporal_style": ["ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz"],
    "overall_consistency": ["ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz"],
    "human_action": ["umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth"],
}
WORKER_TIMEOUT_S = 3600


def split_dimensions(dimensions: list[str], python: str | None) -> tuple[list[str], dict[str, str]]:
    """Which dimensions can be evaluated here, and for each other one the reason (the file it looked for)."""
    if python is not None and shutil.which(python) is None:
        raise ErtaError(f"bench.python={python} is not an interpreter")
    unknown = [name for name in dimensions if name not in WEIGHTS]
    if unknown:
        raise ErtaError(
            f"unknown or unsupported VBench dimension {', '.join(unknown)}; choose from {', '.join(WEIGHTS)}"
        )
    if python is None and find_spec("vbench") is None:
        reason = "the vbench package is not installed: `make setup` installs it, or set bench.python"
        return [], {name: reason for name in dimensions}
    cache = Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench")).expanduser()
    missing = {}
    for name in dimensions:
        absent = [str(cache / file) for file in WEIGHTS[name] if not (cache / file).exists()]
        if absent:
            missing[name] = f"weights not found: {', '.join(absent)}"
    return [name for name in dimensions if name not in missing], missing


def write_lossless(frames: np.ndarray, path: Path, fps: int = 8) -> None:
    """Frames in [0, 1] as an RGB H.264 file without loss beyond 8 bits: codec noise must not be scored."""
    import imageio.v2 as imageio  # type: ignore[import-untyped]

    settings: dict[str, Any] = {
        "codec": "libx264rgb",
        "pixelformat": "rgb24",
        "output_params": ["-crf", "0"],
        "macro_block_size": 1,
    }
    imageio.mimwrite(path, list(to_uint8(frames)), fps=fps, **settings)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] rounded to 8 bits."""
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def evaluate(folder: Path, prompts: dict[str, str], dimensions: list[str], python: str | None = None) -> dict[str, Any]:
    """Run the worker on the clips of `folder`: dimension → {"score", "per_video": {file: score}}.

    Raises ErtaError with the worker's last line if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        answer = Path(scratch) / "answer.json"
        request.write_text(
            json.dumps({"folder": str(folder), "prompts": prompts, "dimensions": dimensions, "scratch": scratch})
        )
        worker = Path(__file__).with_name("vbench_worker.py")
        command = [python or sys.executable, str(worker), str(request), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WORKER_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ErtaError(f"the VBench worker took more than {WORKER_TIMEOUT_S} s") from error
        if done.returncode != 0 or not answer.is_file():
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise ErtaError(f"the VBench worker failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return json.loads(answer.read_text())
