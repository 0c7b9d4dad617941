"""Where the residual lives: the block stack of Wan and FLUX, and what both sites share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from torch import nn

import erta
from erta.options import SITES
from erta.policy import sources
from erta.scheduler import nominal_sigmas
from erta.site import BlocksSite
from tests.pipelines import (
    CALL,
    COG_CALL,
    EVERY_MODEL,
    LTX_CALL,
    MODELS,
    PROMPTS,
    SITE_MASK,
    WAN_CALL,
    build_cogvideox,
    build_ltx,
    build_pipe,
    generate,
)


@pytest.fixture(params=MODELS)
def model(request):
    build, kwargs = MODELS[request.param]
    return build(), kwargs


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_calibrate_plan_run(name, site, tmp_path):
    """One path for both sites and all models; nothing reused is bit-identical, and so is the pipeline afterwards."""
    build, kwargs = EVERY_MODEL[name]
    pipe = build()
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
    with erta.cached(pipe, calibration.plan(steps=len(SITE_MASK))):
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
    branches = len(calls) // len(SITE_MASK)
    before.clear(), after.clear(), calls.clear()
    with erta.cached(pipe, plan) as trace:
        generate(pipe, kwargs)
    assert len(calls) == branches * sum(SITE_MASK)
    for step, source in enumerate(sources(SITE_MASK)):
        for branch in range(branches):
            own, at = step * branches + branch, source * branches + branch
            torch.testing.assert_close(after[own], before[own] + (after[at] - before[at]), rtol=1e-6, atol=1e-6)
    assert trace.cache_bytes == branches * before[0].numel() * 4


def blocks_plan(pipe, kwargs) -> erta.Plan:
    """MASK at the blocks site on whatever grid the pipeline uses: that of a first run."""
    generate(pipe, kwargs)
    sigmas = nominal_sigmas(pipe.scheduler)
    return erta.Plan(mask=SITE_MASK, sigmas=sigmas, nominal_sigmas=sigmas, site="blocks")


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
    with erta.cached(pipe, calibration.plan(steps=len(SITE_MASK), adjust_time=False)):
        assert torch.equal(generate(pipe, COG_CALL), before)
    assert type(pipe.scheduler) is kind and torch.equal(generate(pipe, COG_CALL), before)
    grid = plan.grid_only()
    with erta.cached(pipe, grid), pytest.raises(erta.InstallError, match="no sigmas to move"):
        generate(pipe, {**COG_CALL, "num_inference_steps": 3})
    with pytest.raises(erta.ErtaError, match="does not step along sigmas"):
        erta.decompose(pipe, plan, PROMPTS[0], **COG_CALL)


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
    with erta.cached(pipe, calibration.plan(steps=len(SITE_MASK))):
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
