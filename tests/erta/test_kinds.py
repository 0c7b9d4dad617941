"""Pipelines that do not name their guidance branches, run a part of a schedule, or hold more than a velocity in their output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanVideoToVideoPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

import erta
from erta.architectures import Architecture
from erta.guidance import weights_of
from erta.policy import sources
from erta.site import SeenForward, like_output
from erta.statistics import TrajectoryObserver
from tests.pipelines import CALL, FLUX_CALL, PROMPTS, bare_plan, build_flux, build_pipe, generate, run

STEPS = 8
VIDEO_CALL = dict(
    num_inference_steps=STEPS, strength=0.8, guidance_scale=4.0, height=32, width=32, max_sequence_length=16
)
RUNS = 6  # of the 8 steps, at strength 0.8


def embeds(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def build_video_to_video() -> WanVideoToVideoPipeline:
    """Two forwards a step that nobody names; the last steps alone, and nobody tells the scheduler."""
    parts = build_pipe("unipc").components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    pipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial  # which this pipeline takes for granted
    pipe.vae_scale_factor_temporal = pipe.vae.config.scale_factor_temporal
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, seed: int = 3, **changes) -> torch.Tensor:
    clip = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    call = {**VIDEO_CALL, "video": clip, **changes}
    return pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(seed), output_type="latent", **call).frames


def clip_call(**changes):
    return {**VIDEO_CALL, "video": torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1)), **changes}


def build_sd3() -> StableDiffusion3Pipeline:
    """Both guidance branches in one batch that nobody names."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=24, pooled_projection_dim=20, out_channels=4,
    ).eval()  # fmt: skip
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **dict.fromkeys(absent)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD3_CALL = dict(
    num_inference_steps=6, guidance_scale=4.0, height=64, width=64,
    prompt_embeds=embeds(1, 5, 24), negative_prompt_embeds=embeds(1, 5, 24, seed=1),
    pooled_prompt_embeds=embeds(1, 20, seed=2), negative_pooled_prompt_embeds=embeds(1, 20, seed=3),
)  # fmt: skip


def build_pixart() -> PixArtAlphaPipeline:
    """As many channels again in the output: a learned variance."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=24,
        in_channels=4, cross_attention_dim=24, out_channels=8,
    ).eval()  # fmt: skip
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.2)
    scheduler = DPMSolverMultistepScheduler()
    absent = ("vae", "text_encoder", "tokenizer")
    pipe = PixArtAlphaPipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXART_CALL = dict(
    num_inference_steps=6, guidance_scale=4.0, height=64, width=64, use_resolution_binning=False, negative_prompt=None,
    prompt_embeds=embeds(1, 5, 24), prompt_attention_mask=torch.ones(1, 5),
    negative_prompt_embeds=embeds(1, 5, 24, seed=1), negative_prompt_attention_mask=torch.ones(1, 5),
)  # fmt: skip


def build_z_image() -> ZImagePipeline:
    """Latents in lists; the positive branch first, and a scale that is one less."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=24, rope_theta=256.0, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    ).eval()  # fmt: skip
    absent = ("vae", "text_encoder", "tokenizer")
    pipe = ZImagePipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **dict.fromkeys(absent)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


Z_IMAGE_CALL = dict(
    num_inference_steps=6, guidance_scale=3.0, height=64, width=64,
    prompt_embeds=[embeds(5, 24)], negative_prompt_embeds=[embeds(7, 24, seed=1)],
)  # fmt: skip


def latents(pipe, call, seed: int = 3, **changes) -> torch.Tensor:
    """Final latents of a call without text."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(generator=generator, output_type="latent", **{**call, **changes})[0]


KINDS = {
    "sd3": (build_sd3, SD3_CALL, ["first half", "second half"], 1),
    "pixart": (build_pixart, PIXART_CALL, ["first half", "second half"], 1),
    "z_image": (build_z_image, Z_IMAGE_CALL, ["first half", "second half"], 1),
    "video_to_video": (build_video_to_video, clip_call(prompt=PROMPTS[0]), ["single", "second call"], 2),
}


@pytest.fixture(params=KINDS)
def kind(request):
    build, call, branches, forwards = KINDS[request.param]
    return build(), call, branches, forwards


def test_branches_that_nobody_names(kind):
    """Calibrated, planned, run: nothing reused is bit-identical, forwards as planned, both branches rectified, restored.

    Mutants: the second branch's residual for the first's; the halves taken for one branch; a variance left out or predicted.
    """
    pipe, call, branches, forwards = kind
    plain = latents(pipe, call)
    calibration = erta.calibrate(pipe, window=5, **call)
    signature = calibration.signature
    assert signature["branches"] == branches and calibration.rel_l1()[1:, 0].min() > 0
    channels = calibration.statistics.moments.count.shape[3]
    assert channels == plain.shape[1]
    options = {"adjust_time": signature["grid"] == "sigmas"}
    steps = calibration.num_steps
    with erta.cached(pipe, calibration.plan(steps=steps, **options)):
        assert torch.equal(latents(pipe, call), plain)
    with erta.cached(pipe, calibration.plan(steps=3, **options)) as trace:
        cached = latents(pipe, call)
        assert torch.equal(latents(pipe, call), cached)
    assert sum(trace.forwards.values()) == 3 * forwards and len(trace.executed) == forwards
    assert 0 < (cached - plain).abs().mean() < plain.abs().mean()
    assert torch.equal(latents(pipe, call), plain) and "forward" not in pipe.transformer.__dict__


def test_velocity_reuse_is_what_an_emulation_gives(kind):
    """Outputs kept by a plain wrapper and given back, branch by branch. Mutants: residual for velocity; branches mixed."""
    pipe, call, _, forwards = kind
    plan = erta.calibrate(pipe, window=5, **call).plan(steps=3, reuse="velocity", adjust_time=False, rectify=False)
    with erta.cached(pipe, plan):
        found = latents(pipe, call)
    kept, own, count = {}, pipe.transformer.forward, 0
    computed_at = sources(plan.mask)

    def emulated(*args, **kwargs):
        nonlocal count
        step, branch = divmod(count, forwards)
        count += 1
        if computed_at[step] == step:
            kept[branch] = own(*args, **kwargs)
        return kept[branch]

    pipe.transformer.forward = emulated
    wanted = latents(pipe, call)
    del pipe.transformer.forward
    assert count == len(plan.mask) * forwards and torch.equal(found, wanted)
    assert not torch.equal(found, latents(pipe, call))


def test_another_layout_of_branches_is_refused(kind):
    """Before the first forward is answered. Mutants: guidance off taken for the first branch; samples not counted."""
    pipe, call, _, _ = kind
    made = erta.calibrate(pipe, window=5, **call)
    off = {**call, "guidance_scale": 0.0 if isinstance(pipe, ZImagePipeline) else 1.0}
    unguided = erta.calibrate(pipe, window=5, **off)
    assert unguided.signature["branches"] == ["single"]
    for calibration, other in ((made, off), (unguided, call)):
        plan = calibration.plan(steps=3, adjust_time=False)
        with erta.cached(pipe, plan), pytest.raises(erta.SignatureMismatch, match="guidance_scale was"):
            latents(pipe, other)
    if isinstance(pipe, (PixArtAlphaPipeline, ZImagePipeline)):  # those that repeat given embeddings
        with erta.cached(pipe, made.plan(steps=3, adjust_time=False)) as trace:
            assert latents(pipe, call, num_images_per_prompt=2).shape[0] == 2 and sum(trace.forwards.values()) == 3


def test_weights_are_read_off_what_the_pipeline_made():
    """Closed form. Mutants: the order of the branches, or the sign, taken for granted."""
    first, second = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    values = {"first half": first, "second half": second}
    for weights in ((-3.0, 4.0), (4.0, -3.0), (3.0, -4.0)):
        found = weights_of(values, (weights[0] * first + weights[1] * second).squeeze(0))
        assert found == pytest.approx(weights, abs=1e-5)
    third, sample = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    made = 5 * first - 3 * second - third + 0.5 * sample
    assert weights_of({**values, "third": third}, made, sample) == pytest.approx((5.0, -3.0, -1.0), abs=1e-5)
    assert weights_of(values, torch.randn(1, 4, 8, 8)) is None  # made in another way
    assert weights_of(values, torch.randn(1, 2, 8, 8)) is None
    assert weights_of({"a": first, "b": first}, 2 * first) == pytest.approx((2.0, 0.0), abs=1e-5)


def test_phi_is_of_what_the_solver_is_given():
    """Of unnamed branches too, whose weights are seen: by hand from the stored outputs. Mutant: phi of one branch."""
    pipe, seen = build_sd3(), []
    made = erta.calibrate(pipe, window=2, **SD3_CALL)
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    latents(pipe, SD3_CALL, seed=0)

    def guided(value):
        uncond, cond = value.chunk(2)
        return uncond + SD3_CALL["guidance_scale"] * (cond - uncond)

    (x_old, v_old), (x, v) = seen[2], seen[3]
    error = guided(x + v_old - x_old) - guided(v)
    assert made.statistics.phi_ratio.mean[0, 3, 0] == pytest.approx(
        float(error.abs().sum() / guided(v).abs().sum()), rel=1e-3
    )


def test_true_guidance_beside_the_embedded_one():
    """FLUX with a negative prompt: two branches, and the scale that combines them is the plan's.

    Mutants: phi by the embedded scale; another true scale, or none, accepted.
    """
    pipe = build_flux()
    call = {**FLUX_CALL, "negative_prompt": "a red star", "true_cfg_scale": 2.0}
    plain = generate(pipe, call)
    made = erta.calibrate(pipe, PROMPTS[:1], window=4, **call)
    assert made.signature["branches"] == ["cond", "uncond"] and made.signature["true_cfg_scale"] == 2.0
    with erta.cached(pipe, made.plan(steps=6)):
        assert torch.equal(generate(pipe, call), plain)
    with erta.cached(pipe, made.plan(steps=3)) as trace:
        assert 0 < (generate(pipe, call) - plain).abs().mean() < plain.abs().mean()
        assert trace.forwards == {"cond": 3, "uncond": 3}
        for changes in ({"true_cfg_scale": 3.0}, {"true_cfg_scale": 1.0}, {"negative_prompt": None}):
            with pytest.raises(erta.SignatureMismatch, match="true_cfg_scale was 2.0"):
                generate(pipe, {**call, **changes})
    split = erta.decompose(pipe, made.plan(steps=3), PROMPTS[0], **call)
    assert split.closure < 1e-4 and split.norms["injected"] > 0


def test_a_part_of_a_schedule():
    """Strength 0.8 runs 6 of 8 steps: those are calibrated, planned and executed; another strength says so in its words.

    Mutants: the whole grid for the part; steps counted from the grid's first; the other strength noticed on the way.
    """
    pipe, forwards = build_video_to_video(), []
    made = erta.calibrate(pipe, PROMPTS[:1], window=5, **clip_call())
    pipe.scheduler.set_timesteps(STEPS)
    begin = STEPS - RUNS
    np.testing.assert_array_equal(made.signature["sigmas"], pipe.scheduler.sigmas[begin:].numpy())
    assert made.num_steps == RUNS and made.signature["begin"] == begin
    plan = made.plan(steps=3)
    assert plan.begin == begin and not np.array_equal(plan.sigmas, plan.nominal_sigmas)
    with erta.cached(pipe, plan) as trace:
        video(pipe)
        assert trace.executed["single"] == list(enumerate(plan.mask)) and trace.forwards["second call"] == 3
        pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
        with pytest.raises(erta.SignatureMismatch, match=r"strength was .0.8, which runs 6 of 8 steps.* is 0.5 now"):
            video(pipe, strength=0.5)
        assert not forwards
    bare = bare_plan(pipe, (True, False) * 4)
    with erta.cached(pipe, bare), pytest.raises(erta.SignatureMismatch, match=r"\(strength\) was '8 of 8 steps'"):
        video(pipe)
    assert len(forwards) == 1
    with pytest.raises(erta.ErtaError, match="no grid of its own"):
        plan.grid_only()
    with pytest.raises(erta.ErtaError, match="not interpolated"):
        erta.interpolate(made, np.array(made.signature["sigmas"])[[0, 2, 4, 6]])


def test_sigmas_of_the_callers_own():
    """The number of steps follows from them, whatever its default. Mutant: the default compared with the plan."""
    pipe = build_flux()
    call = {key: value for key, value in FLUX_CALL.items() if key != "num_inference_steps"}
    call["sigmas"] = np.linspace(1.0, 0.2, 5).tolist()
    plain = generate(pipe, call)
    made = erta.calibrate(pipe, PROMPTS[:1], window=4, **call)
    assert made.num_steps == 5
    with erta.cached(pipe, made.plan(steps=5)):
        assert torch.equal(generate(pipe, call), plain)
    with erta.cached(pipe, made.plan(steps=3)) as trace:
        generate(pipe, call)
        with pytest.raises(erta.SignatureMismatch, match="num_inference_steps was 5 .* is 6 now"):
            generate(pipe, FLUX_CALL)
    assert trace.forwards == {"cond": 3}


def test_timesteps_of_the_callers_own():
    """The same with `timesteps=`, of a scheduler of noise levels. Mutant: other timesteps accepted for their number."""
    pipe = build_pixart()
    call = {key: value for key, value in PIXART_CALL.items() if key != "num_inference_steps"}
    call["timesteps"] = [900, 700, 500, 300, 100]
    plain = latents(pipe, call)
    made = erta.calibrate(pipe, window=4, **call)
    with erta.cached(pipe, made.plan(steps=5, adjust_time=False)):
        assert torch.equal(latents(pipe, call), plain)
    with erta.cached(pipe, made.plan(steps=3, adjust_time=False)) as trace:
        latents(pipe, call)
        assert sum(trace.forwards.values()) == 3
        with pytest.raises(erta.SignatureMismatch, match="sigmas was '6 values"):
            latents(pipe, call, timesteps=[950, 700, 500, 300, 100])


def test_a_solver_of_two_forwards_a_step_is_refused_at_once():
    """Mutant: calibrated to the end, and then every plan refused."""
    pipe, forwards = build_pipe(), []
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=5.0)
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(erta.ErtaError, match="FlowMatchHeunDiscreteScheduler does not go down its grid") as caught:
        erta.calibrate(pipe, PROMPTS, **CALL)
    assert not forwards and len(str(caught.value).splitlines()) == 1


def test_several_passes_are_named():
    """Mutant: steps of the second pass taken for more of the first."""
    observer, x = TrajectoryObserver(2, None, Architecture("any")), torch.randn(1, 16, 2, 4, 4)
    for step in range(3):
        observer.observe(SeenForward(step, "cond", x, x, x, lambda old: old))
    with pytest.raises(erta.ErtaError, match="from step 2 to step 0: it runs its steps in several passes"):
        observer.observe(SeenForward(0, "cond", x, x, x, lambda old: old))


def test_an_output_that_is_not_like_the_input_is_refused():
    """Mutant: broadcast, or a raw error of the tensors."""
    with pytest.raises(erta.InstallError, match=r"Odd answers an input of \(1, 4, 8, 8\) .*add an entry"):
        like_output(torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 8, 8), Architecture("Odd"))


def test_guidance_switched_off_on_the_way():
    """Refused when it happens, in one line. Mutant: calibrated to the end, and the plan refused after a whole generation."""
    pipe, steps = build_pipe(), []

    def switch_off(pipe, step, timestep, values):
        steps.append(step)
        pipe._guidance_scale = 0.0 if step >= 3 else pipe._guidance_scale
        return {}

    with pytest.raises(erta.ErtaError, match="switched on or off at step 4"):
        erta.calibrate(pipe, PROMPTS[:1], callback_on_step_end=switch_off, **CALL)
    assert max(steps) == 4
    with erta.cached(pipe, bare_plan(pipe)), pytest.raises(erta.ExecutionMismatch, match="guidance switched off"):
        run(pipe, callback_on_step_end=switch_off)
