"""Where the residual lives: the block stack of Wan and FLUX, and what both sites share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import erta
from erta.schedule import sources
from erta.scheduler import nominal_sigmas
from erta.site import SITES, BlocksSite
from experiments.training.text import build_tokenizer
from tests.conftest import CALL, PROMPTS, build_pipe

MASK = (True, True, False, True, False, False)
WAN_CALL = {**CALL, "num_inference_steps": len(MASK)}
FLUX_CALL = dict(num_inference_steps=len(MASK), guidance_scale=3.5, height=64, width=64, max_sequence_length=16)


def tiny_t5(tokenizer) -> T5EncoderModel:
    """A random T5 encoder of width 24 for a tokenizer's words."""
    config = T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def build_flux() -> FluxPipeline:
    """A tiny random FluxPipeline: packed tokens, both kinds of blocks, guidance in the embedding."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    words = len(tokenizer)
    clip = CLIPTextConfig(
        vocab_size=words, hidden_size=20, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=1, projection_dim=20,
    )  # fmt: skip
    short = build_tokenizer()
    short.model_max_length = 16
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.36,
            shift_factor=0.1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=short,
        text_encoder_2=tiny_t5(tokenizer),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_ltx() -> LTXPipeline:
    """A tiny random LTXPipeline: both guidance branches in one batch."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=24,
    ).eval()
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


LTX_CALL = dict(
    num_inference_steps=len(MASK), guidance_scale=3.0, height=64, width=64, num_frames=9, max_sequence_length=16
)
MODELS = {"wan": (build_pipe, WAN_CALL), "flux": (build_flux, FLUX_CALL)}


def generate(pipe, kwargs, seed: int = 3) -> torch.Tensor:
    """Final latents."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=PROMPTS[0], generator=generator, output_type="latent", **kwargs)[0]


@pytest.fixture(params=MODELS)
def model(request):
    build, kwargs = MODELS[request.param]
    return build(), kwargs


@pytest.mark.parametrize("site", SITES)
def test_calibrate_plan_run(model, site, tmp_path):
    """One path for both sites and both models; nothing reused is bit-identical, and so is the pipeline afterwards."""
    pipe, kwargs = model
    keys, stacks = list(pipe.transformer.state_dict()), dict(pipe.transformer._modules)
    before = generate(pipe, kwargs)
    calibration = erta.calibrate(pipe, PROMPTS, site=site, window=4, **kwargs)
    calibration.save(tmp_path / "c.safetensors")
    plan = erta.Calibration.load(tmp_path / "c.safetensors").plan(steps=3)
    plan.save(tmp_path / "plan.json")
    assert plan.site == erta.Plan.load(tmp_path / "plan.json").site == site
    with erta.cached(pipe, plan) as trace:
        cached = generate(pipe, kwargs)
        assert torch.equal(generate(pipe, kwargs), cached)
    assert set(trace.forwards.values()) == {3} and torch.isfinite(cached).all()
    assert 0 < (cached - before).abs().mean() < before.abs().mean()
    with erta.cached(pipe, calibration.plan(steps=len(MASK))):
        assert torch.equal(generate(pipe, kwargs), before)
    assert torch.equal(generate(pipe, kwargs), before)
    assert list(pipe.transformer.state_dict()) == keys and dict(pipe.transformer._modules) == stacks


def test_blocks_by_hand(model):
    """Tokens after the stack at a reused step are its own before plus the last computed difference.

    Mutants: the residual of one block, tokens before swapped with after, blocks that still run.
    """
    pipe, kwargs = model
    transformer = pipe.transformer
    embed = getattr(transformer, "patch_embedding", None) or transformer.x_embedder
    first = (transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks)[0]
    before, after, calls = [], [], []
    embed.register_forward_hook(
        lambda module, args, output: before.append(output.flatten(2).transpose(1, 2) if output.ndim > 3 else output)
    )
    transformer.norm_out.register_forward_pre_hook(lambda module, args: after.append(args[0]))
    first.register_forward_hook(lambda *_: calls.append(1))
    plan = blocks_plan(pipe, kwargs)
    branches = len(calls) // len(MASK)
    before.clear(), after.clear(), calls.clear()
    with erta.cached(pipe, plan) as trace:
        generate(pipe, kwargs)
    assert len(calls) == branches * sum(MASK)
    for step, source in enumerate(sources(MASK)):
        for branch in range(branches):
            own, at = step * branches + branch, source * branches + branch
            torch.testing.assert_close(after[own], before[own] + (after[at] - before[at]), rtol=1e-6, atol=1e-6)
    assert trace.cache_bytes == branches * before[0].numel() * 4


def blocks_plan(pipe, kwargs) -> erta.Plan:
    """MASK at the blocks site on whatever grid the pipeline uses: that of a first run."""
    generate(pipe, kwargs)
    sigmas = nominal_sigmas(pipe.scheduler)
    return erta.Plan(mask=MASK, sigmas=sigmas, nominal_sigmas=sigmas, site="blocks")


@pytest.mark.parametrize("site", SITES)
def test_statistics_describe_what_the_cache_would_return(site):
    """The mean error that is calibrated is the one the hook makes at its first reused step. Mutant: another site's."""
    pipe, errors = build_pipe(), {}
    calibration = erta.calibrate(pipe, PROMPTS[:1], site=site, window=2, seed=3, **WAN_CALL)
    mask = (True, True, False, True, True, True)
    outputs = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    plain = generate(pipe, WAN_CALL)
    truth, _ = outputs[4:6], outputs.clear()
    sigmas = nominal_sigmas(pipe.scheduler)
    with erta.cached(pipe, erta.Plan(mask=mask, sigmas=sigmas, nominal_sigmas=sigmas, site=site)):
        assert not torch.equal(generate(pipe, WAN_CALL), plain)
    handle.remove()
    for index, branch in enumerate(calibration.signature["branches"]):
        errors[branch] = (outputs[4 + index] - truth[index]).mean((0, 2, 3, 4)).numpy()
        found = calibration.statistics.moments.mean_e[index, 2, 0]
        np.testing.assert_allclose(found, errors[branch], rtol=1e-3, atol=1e-6)


def test_both_guidance_branches_in_one_batch():
    """LTX: two branches are calibrated, one forward a step is counted. Mutant: the pair taken for one branch."""
    pipe = build_ltx()
    before = generate(pipe, LTX_CALL)
    calibration = erta.calibrate(pipe, PROMPTS, window=4, **LTX_CALL)
    assert calibration.signature["branches"] == ["uncond", "cond"]
    with erta.cached(pipe, calibration.plan(steps=3)) as trace:
        cached = generate(pipe, LTX_CALL)
        with pytest.raises(erta.SignatureMismatch, match="guidance_scale"):
            generate(pipe, {**LTX_CALL, "guidance_scale": 1.0})
    assert trace.forwards == {"cond_uncond": 3} and 0 < (cached - before).abs().mean() < before.abs().mean()
    unguided = {**LTX_CALL, "guidance_scale": 1.0}
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=4, **unguided)
    assert calibration.signature["branches"] == ["cond"]
    with erta.cached(pipe, calibration.plan(steps=3)) as trace:
        generate(pipe, unguided)
    with pytest.raises(erta.ErtaError, match="use site=output"):
        erta.calibrate(pipe, PROMPTS[:1], site="blocks", window=4, **LTX_CALL)


def build_cogvideox(scheduler) -> CogVideoXPipeline:
    """A tiny random CogVideoXPipeline: both branches in one batch, channels after frames, no sigmas."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    ).eval()
    pipe = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        vae=None,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


COG_CALL = dict(
    num_inference_steps=len(MASK), guidance_scale=3.0, height=64, width=64, num_frames=9, max_sequence_length=16
)


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_schedulers_without_sigmas(kind):
    """Policy and rectification work, by channel of a latent whose second axis is time; the grid is not moved."""
    pipe = build_cogvideox(kind(prediction_type="v_prediction", timestep_spacing="trailing"))
    before = generate(pipe, COG_CALL)
    calibration = erta.calibrate(pipe, PROMPTS, window=4, **COG_CALL)
    assert calibration.statistics.moments.count.shape[3] == 4  # channels, not frames
    with pytest.raises(erta.ErtaError, match="no sigmas to move"):
        calibration.plan(steps=3)
    plan = calibration.plan(steps=3, adjust_time=False)
    with erta.cached(pipe, plan) as trace:
        cached = generate(pipe, COG_CALL)
        assert torch.equal(generate(pipe, COG_CALL), cached)
    assert trace.forwards == {"cond_uncond": 3} and 0 < (cached - before).abs().mean() < before.abs().mean()
    with erta.cached(pipe, calibration.plan(steps=len(MASK), adjust_time=False)):
        assert torch.equal(generate(pipe, COG_CALL), before)
    assert type(pipe.scheduler) is kind and torch.equal(generate(pipe, COG_CALL), before)
    grid = plan.grid_only()
    with erta.cached(pipe, grid), pytest.raises(erta.InstallError, match="no sigmas to move"):
        generate(pipe, {**COG_CALL, "num_inference_steps": 3})
    with pytest.raises(erta.ErtaError, match="does not step along sigmas"):
        erta.decompose(pipe, plan, PROMPTS[0], **COG_CALL)


def test_true_guidance_beside_the_embedded_one_is_refused():
    pipe = build_flux()
    with pytest.raises(erta.ErtaError, match="true_cfg_scale"):
        erta.calibrate(pipe, PROMPTS[:1], negative_prompt="a red star", true_cfg_scale=2.0, **FLUX_CALL)
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=4, **FLUX_CALL)
    with erta.cached(pipe, calibration.plan(steps=3)), pytest.raises(erta.ErtaError, match="true_cfg_scale"):
        generate(pipe, {**FLUX_CALL, "negative_prompt": "a red star", "true_cfg_scale": 2.0})


def test_unknown_blocks_are_refused():
    class OtherTransformer(nn.Module):
        pass

    with pytest.raises(erta.InstallError, match="OtherTransformer.*use site=output"):
        BlocksSite(OtherTransformer())


def test_bad_sites(pipe):
    with pytest.raises(erta.ErtaError, match="site must be one of"):
        erta.calibrate(pipe, PROMPTS, site="middle", **CALL)
    sigmas = np.linspace(1, 0, 4, dtype=np.float32)
    with pytest.raises(erta.ErtaError, match="use site=output"):
        erta.Plan(mask=(True,) * 3, sigmas=sigmas, site="blocks", reuse="velocity")
    with pytest.raises(erta.ErtaError, match="site must be one of"):
        erta.Plan(mask=(True,) * 3, sigmas=sigmas, site="middle")


def build_image_to_video() -> WanImageToVideoPipeline:
    """A tiny random WanImageToVideoPipeline: 16 channels of noise, 4 of a mask, 16 of the image; 16 come out."""
    text_to_video = build_pipe()
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config({**text_to_video.transformer.config, "in_channels": 36}).eval()
    with torch.no_grad():
        transformer.proj_out.weight.mul_(8)
    parts = {**text_to_video.components, "transformer": transformer, "transformer_2": None}
    pipe = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("site", SITES)
def test_image_to_video_whole(site):
    """Calibrate, plan and run with an input that has more channels than the output. Mutant: the last channels."""
    pipe = build_image_to_video()
    call = {**WAN_CALL, "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))}

    def latents(seed: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(prompt=PROMPTS[0], generator=generator, output_type="latent", **call).frames

    calibration = erta.calibrate(pipe, PROMPTS, site=site, window=4, **call)
    assert calibration.signature["latent_shape"][0] == 36 and calibration.statistics.moments.count.shape[3] == 16
    uncached = latents()
    with erta.cached(pipe, calibration.plan(steps=len(MASK))):
        assert torch.equal(latents(), uncached)
    with erta.cached(pipe, calibration.plan(steps=3)) as trace:
        cached = latents()
    assert trace.forwards == {"cond": 3, "uncond": 3}
    assert trace.cache_bytes == 2 * 4 * (16 * 2 * 4 * 4 if site == "output" else 8 * 24)
    assert 0 < (cached - uncached).abs().mean() < uncached.abs().mean()
    if site == "output":  # the last channels are the image and never change: their residual would be the velocity
        reused = []
        for form in ("residual", "velocity"):
            with erta.cached(pipe, calibration.plan(steps=3, reuse=form, adjust_time=False, rectify=False)):
                reused.append(latents())
        assert (reused[0] - reused[1]).abs().max() > 1e-3
