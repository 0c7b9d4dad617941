"""What a model needs of the GPU's memory, and what is said when it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLWan, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from hydra import compose, initialize_config_dir

import erta
from erta.errors import ErtaError, InstallError
from erta.signature import weights_digest
from experiments.harness import checks, config
from experiments.harness.config import CONF
from experiments.harness.generate import generate
from experiments.models import load
from experiments.output.files import read_lines
from tests.commands import folders
from tests.pipelines import CALL, PROMPTS, build_pipe, run


def configured(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("config", overrides=list(overrides))
    config.validate(cfg)
    return cfg


@pytest.mark.slow
def test_out_of_memory_keeps_finished_prompts(command, tmp_path, monkeypatch):
    """In the second prompt's decoding. Mutants: a traceback, the first prompt lost, an option named that is on already."""
    decode, calls = AutoencoderKLWan.decode, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # warm-up, both arms of the first prompt, the second's first
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKLWan, "decode", full)
    arguments = ("cache=uniform", "bench=fidelity", "model.vae_tiling=true")
    code, printed = command(*arguments)
    message = printed[printed.index("error:") :].strip()
    assert code == 1 and "Traceback" not in printed and len(message.splitlines()) == 2
    for option in ("at 64x64 with 5 frames", "model.offload=model", "model.dtype=bfloat16", "model.num_frames=5"):
        assert option in message
    assert "vae_tiling" not in message
    (folder,) = folders(tmp_path)
    assert [row["index"] for row in read_lines(folder / "per_prompt.jsonl")] == [0]
    code, printed = command(*arguments)
    assert code == 0 and "1 of 3 prompts are done" in printed and folders(tmp_path) == [folder]


def test_out_of_memory_in_a_calibration_is_named_too(command, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FluxTransformer2DModel, "forward", full)
    code, printed = command("experiment=calibrate", "model=flux_tiny", "model.offload=sequential", quick=False)
    message = printed[printed.index("error:") :]
    assert code == 1 and "out of GPU memory" in message and "model.vae_tiling=true" in message
    assert "model.offload" not in message and "frames" not in message


@pytest.mark.parametrize("offload", checks.OFFLOADS)
def test_offload_is_the_pipelines_own(weights, monkeypatch, offload):
    """Mutants: one offload for the other, a pipeline moved to the GPU as a whole before."""
    done = []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(WanPipeline, name, lambda self, gpu_id, name=name: done.append((name, gpu_id)))
    monkeypatch.setattr(WanPipeline, "to", lambda self, device: done.append(device) or self)
    monkeypatch.setattr(load.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load.torch.cuda, "current_device", lambda: 3)  # a rank's own
    pipe = load.load_pipeline(configured(f"model.path={weights}", f"model.offload={offload}"))
    assert isinstance(pipe, WanPipeline)
    wanted = {
        "none": "cuda",
        "model": ("enable_model_cpu_offload", 3),
        "sequential": ("enable_sequential_cpu_offload", 3),
    }
    assert done == [wanted[offload]]


def test_tiling_and_compilation_are_switched_on(weights):
    """Mutants: an option that is read and dropped, or on without being asked for."""
    plain = load.load_pipeline(configured(f"model.path={weights}"))
    assert not plain.vae.use_tiling and all(block._compiled_call_impl is None for block in plain.transformer.blocks)
    pipe = load.load_pipeline(configured(f"model.path={weights}", "model.vae_tiling=true", "model.compile=true"))
    assert pipe.vae.use_tiling and all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert pipe.transformer._compiled_call_impl is None  # its forward is what the cache stands in for
    assert weights_digest(pipe.transformer) == weights_digest(plain.transformer)


def test_compiled_blocks_run_under_a_cache_at_both_sites(weights):
    """With the compiler's tracing and without its code generation. Mutants: a cache that goes around compiled blocks."""
    plain = load.load_pipeline(configured(f"model.path={weights}"))
    pipe = load.load_pipeline(configured(f"model.path={weights}"))
    traced = []

    def backend(graph, inputs):
        traced.append(len(inputs))
        return graph.forward

    pipe.transformer.compile_repeated_blocks(backend=backend)
    for site in ("output", "blocks"):
        plan = erta.calibrate(plain, PROMPTS[:1], site=site, window=4, **CALL).plan(steps=4)
        made = []
        for one in (plain, pipe):
            with erta.cached(one, plan) as trace:
                made.append(run(one))
            assert trace.forwards == {"cond": 4, "uncond": 4}
        torch.testing.assert_close(made[1], made[0], atol=1e-4, rtol=1e-4)
    assert traced


def test_what_a_model_cannot_do_is_said(weights, monkeypatch):
    """Mutants: the options ignored where they have no effect."""
    monkeypatch.setattr(WanTransformer3DModel, "_repeated_blocks", None)
    with pytest.raises(ErtaError, match="WanTransformer3DModel does not say which of its blocks"):
        load.load_pipeline(configured(f"model.path={weights}", "model.compile=true"))

    def not_here(self):
        raise NotImplementedError("Tiling doesn't seem to be implemented")

    monkeypatch.setattr(AutoencoderKLWan, "enable_tiling", not_here)
    with pytest.raises(ErtaError, match="AutoencoderKLWan of wan21_tiny cannot decode in tiles"):
        load.load_pipeline(configured(f"model.path={weights}", "model.vae_tiling=true"))
    with pytest.raises(ErtaError, match="come and go cannot be compiled"):
        configured("model.compile=true", "model.offload=sequential")
    with pytest.raises(ErtaError, match="model.offload must be one of none, model, sequential"):
        configured("model.offload=disk")


def test_sequential_offload_is_the_same_model():
    """Weights on the meta device between forwards. Mutants: a digest of nothing or remembered from before, a
    record that names the meta device as where the model ran."""
    pipe = build_pipe()
    digest, plans, wanted = weights_digest(pipe.transformer), {}, {}
    for site in ("output", "blocks"):
        plans[site] = erta.calibrate(pipe, PROMPTS[:1], site=site, window=4, **CALL).plan(steps=4)
        with erta.cached(pipe, plans[site]):
            wanted[site] = run(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    assert weights_digest(pipe.transformer) == digest
    stored = pipe.transformer.blocks[1].attn1.to_q._hf_hook.weights_map["weight"]
    before = stored.clone()
    with torch.no_grad():
        stored += 1e-2
        assert weights_digest(pipe.transformer) != digest
        stored.copy_(before)
    for site, plan in plans.items():
        with erta.cached(pipe, plan) as trace:
            for _ in range(2):
                torch.testing.assert_close(run(pipe), wanted[site], atol=1e-4, rtol=1e-4)
        assert trace.calls == 2 and trace.forwards == {"cond": 4, "uncond": 4}
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=4, **CALL)
    assert calibration.signature["weights"] == digest and calibration.record["device"].startswith("cpu")
    sample = generate(pipe, PROMPTS[0], 0, CALL)
    assert 0 < sample.forward_s < sample.pipeline_s and np.isfinite(sample.frames).all()


def test_meta_weights_without_values_are_refused():
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=8)
    with pytest.raises(InstallError, match="is on the meta device and has no values"):
        weights_digest(transformer)


@pytest.mark.slow
def test_options_are_in_the_record(command):
    """Tiles are larger than these frames, so the result is the same. Mutant: the option missing from the record."""
    psnr = []
    for tiling in ("true", "false"):
        out = f"outputs/{tiling}/run"
        code, printed = command(
            "cache=uniform",
            "bench=fidelity",
            "bench.num_prompts=1",
            f"model.vae_tiling={tiling}",
            f"hydra.run.dir={out}",
        )
        assert code == 0, printed
        record = json.loads(Path(out, "record.json").read_text())
        assert str(record["config"]["model"]["vae_tiling"]).lower() == tiling
        psnr.append(record["metrics"]["psnr_db"])
    assert psnr[0] == psnr[1]
