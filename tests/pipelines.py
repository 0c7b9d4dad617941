"""Tiny random pipelines: the real classes, untrained, a whole run in a fraction of a second."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import erta
from erta.scheduler import nominal_sigmas
from experiments.models.open_sora.autoencoder import AutoencoderKLOpenSora
from experiments.models.open_sora.pipeline import OpenSoraPipeline
from experiments.models.open_sora.sizes import rectified_flow
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training.text import TEXT_DIM, build_text_encoder
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


def build_pipe(solver: str = "unipc", layers: int = 2) -> WanPipeline:
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
        num_layers=layers,
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


SOME = (True, True, False, True, False, False, True, False)


def bare_plan(pipe, mask=SOME, **changes) -> erta.Plan:
    """A plan on the scheduler's own grid, without a calibration."""
    pipe.scheduler.set_timesteps(len(mask))
    sigmas = nominal_sigmas(pipe.scheduler)
    return erta.Plan(mask=mask, sigmas=sigmas, nominal_sigmas=sigmas, **changes)


SITE_MASK = (True, True, False, True, False, False)
WAN_CALL = {**CALL, "num_inference_steps": len(SITE_MASK)}
FLUX_CALL = dict(num_inference_steps=len(SITE_MASK), guidance_scale=3.5, height=64, width=64, max_sequence_length=16)


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
    num_inference_steps=len(SITE_MASK), guidance_scale=3.0, height=64, width=64, num_frames=9, max_sequence_length=16
)
MODELS = {"wan": (build_pipe, WAN_CALL), "flux": (build_flux, FLUX_CALL)}


def generate(pipe, kwargs, seed: int = 3) -> torch.Tensor:
    """Final latents."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=PROMPTS[0], generator=generator, output_type="latent", **kwargs)[0]


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
    num_inference_steps=len(SITE_MASK), guidance_scale=3.0, height=64, width=64, num_frames=9, max_sequence_length=16
)


TINY_STDIT3 = dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, text_dim=24, text_length=16, freq_dim=32)
TINY_VAE = dict(image_channels=(8, 8, 8, 8), image_layers=1, time_channels=4, time_layers=2, groups=2)
OPEN_SORA_CALL = dict(
    num_inference_steps=len(SITE_MASK), guidance_scale=4.0, height=32, width=56, num_frames=17, max_sequence_length=16
)


def build_open_sora() -> OpenSoraPipeline:
    """A tiny random OpenSoraPipeline: both branches in one batch, pairs of blocks, half of the head not used."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    transformer = STDiT3Transformer3DModel(**TINY_STDIT3).eval()
    with torch.no_grad():
        transformer.head.proj.weight.mul_(4)
    pipe = OpenSoraPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_t5(tokenizer),
        transformer=transformer,
        vae=AutoencoderKLOpenSora(**TINY_VAE).eval(),
        scheduler=rectified_flow(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


EVERY_MODEL = {**MODELS, "open_sora": (build_open_sora, OPEN_SORA_CALL)}


def build_two(solver: str = "unipc", boundary: float | None = 0.85, seed: int = 7) -> WanPipeline:
    """The tiny pipeline with a second random transformer, which takes over at step 4 of 8 under every solver."""
    first = build_pipe(solver)
    torch.manual_seed(seed)
    second = WanTransformer3DModel.from_config(first.transformer.config).eval()
    with torch.no_grad():
        second.proj_out.weight.mul_(8)
    pipe = WanPipeline(**{**first.components, "transformer_2": second}, boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe
