"""A tiny random WanPipeline: the real classes, untrained, a whole run in a fraction of a second."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # `pytest -n auto`: the workers share the cores
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from experiments.training.text import TEXT_DIM, build_text_encoder, build_tokenizer
from experiments.training.video_vae import build_vae

STEPS = 8
CALL = dict(num_inference_steps=STEPS, guidance_scale=4.0, height=32, width=32, num_frames=5, max_sequence_length=16)
PROMPTS = ["a small red circle moving left on a dark background", "a large blue star rising on a light background"]


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def dpmpp() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


SOLVERS = {"unipc": unipc, "euler": euler, "dpmpp": dpmpp}


def build_pipe(solver: str = "unipc") -> WanPipeline:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    # an untrained output is near zero; a larger one makes every difference visible
    with torch.no_grad():
        transformer.proj_out.weight.mul_(8)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer), 0).eval(),
        vae=build_vae(0).eval(),
        scheduler=SOLVERS[solver](),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: WanPipeline, prompt: str = PROMPTS[0], seed: int = 3, **changes) -> torch.Tensor:
    """Final latents of one generation."""
    kwargs = {**CALL, **changes}
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **kwargs).frames


@pytest.fixture
def pipe() -> WanPipeline:
    return build_pipe()


@pytest.fixture(scope="session")
def calibrations():
    """Calibrations of the tiny pipeline, by solver."""
    import erta

    return {name: erta.calibrate(build_pipe(name), PROMPTS, window=6, **CALL) for name in SOLVERS}
