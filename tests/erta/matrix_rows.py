"""Tiny random instances of pipeline classes, a row each: the transformer's sizes, and what of the call is the class's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch

from experiments.models.open_sora.pipeline import OpenSoraPipeline
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel
from tests.erta.matrix_parts import (
    checker,
    ddim,
    dpm,
    dynamic_euler,
    edm,
    euler,
    flow_dpm,
    image_vae,
    picture_and_sound,
    unipc,
    video_vae,
)

STEPS, TOKENS, WIDTH, POOLED = 6, 5, 24, 20


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given_by_name() -> dict[str, Any]:
    """Arguments of a call, of which a pipeline gets those that its signature has."""
    made: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "negative_prompt": None,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    for seed, sign in enumerate(("", "negative_")):
        made[f"{sign}prompt_embeds"] = noise(1, TOKENS, WIDTH, seed=seed)
        made[f"{sign}pooled_prompt_embeds"] = noise(1, POOLED, seed=seed + 2)
        for name in ("prompt_attention_mask", "prompt_embeds_mask"):
            made[f"{sign}{name}"] = torch.ones(1, TOKENS)
    return made


OWN = {"OpenSoraPipeline": OpenSoraPipeline, "STDiT3Transformer3DModel": STDiT3Transformer3DModel}


def class_named(name: str) -> Any:
    """A class of this project or of diffusers."""
    return OWN.get(name) or getattr(diffusers, name)


@dataclass(frozen=True)
class Row:
    """A pipeline class, its transformer's class and sizes, and what of its call is its own."""

    pipeline: str
    transformer: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = euler
    off: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    parts: Callable[[], dict[str, Any]] = dict
    settings: dict[str, Any] = field(default_factory=dict)  # of the pipeline object: sizes that it would round to

    def build(self, guided: bool = True) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of a call without output type and generator, with guidance or without."""
        kind = class_named(self.pipeline)
        torch.manual_seed(0)
        transformer = class_named(self.transformer)(**self.config).eval()
        with torch.no_grad():  # some outputs start at zero
            for parameter in transformer.parameters():
                if parameter.numel() and not parameter.any():
                    parameter.normal_(std=0.2)
        parameters = inspect.signature(kind.__init__).parameters
        absent = [name for name, about in parameters.items() if about.default is about.empty and name != "self"]
        parts = {**dict.fromkeys(absent), "transformer": transformer, "scheduler": self.scheduler(), **self.parts()}
        pipe = kind(**parts)
        for name, value in self.settings.items():
            setattr(pipe, name, value)
        pipe.set_progress_bar_config(disable=True)
        has = inspect.signature(kind.__call__).parameters
        call = {name: value for name, value in given_by_name().items() if name in has}
        call |= self.call if guided else {**self.call, **self.off}
        return pipe, {name: value for name, value in call.items() if value is not DROP}


DROP: Any = object()  # an argument that a pipeline has and is not to be given
AXES = dict(attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8))
TEXT = dict(joint_attention_dim=WIDTH)
WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=32, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
PIXART = dict(
    sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
    in_channels=4, cross_attention_dim=24, out_channels=8,
)  # fmt: skip

TEXT_ROWS = (
    Row("WanPipeline", "WanTransformer3DModel", WAN, scheduler=unipc),
    Row("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", WAN, scheduler=unipc),
    Row(
        "FluxPipeline", "FluxTransformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=POOLED, guidance_embeds=True, **AXES, **TEXT),
        call={"true_cfg_scale": 2.0}, scheduler=dynamic_euler, off={"true_cfg_scale": 1.0},
    ),
    Row(
        "ChromaPipeline", "ChromaTransformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, approximator_num_channels=16, approximator_hidden_dim=16,
             approximator_layers=1, **AXES, **TEXT),
    ),
    Row(
        "OvisImagePipeline", "OvisImageTransformer2DModel",
        dict(in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, **AXES, **TEXT), scheduler=dynamic_euler,
    ),
    Row(
        "BriaPipeline", "BriaTransformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, **AXES, **TEXT), parts=image_vae,
    ),
    Row(
        "Flux2Pipeline", "Flux2Transformer2DModel",
        dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=32, **TEXT),
        scheduler=dynamic_euler,
    ),
    Row(
        "QwenImagePipeline", "QwenImageTransformer2DModel",
        dict(in_channels=16, out_channels=4, num_layers=1, **AXES, **TEXT),
        call={"true_cfg_scale": 3.0, "guidance_scale": DROP}, scheduler=dynamic_euler, off={"true_cfg_scale": 1.0},
    ),
    Row(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        dict(sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
             caption_projection_dim=16, pooled_projection_dim=POOLED, out_channels=4, **TEXT),
    ),
    Row(
        "AuraFlowPipeline", "AuraFlowTransformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
             num_attention_heads=4, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64, **TEXT),
    ),
    Row("PixArtAlphaPipeline", "PixArtTransformer2DModel", PIXART, scheduler=dpm),
    Row("PixArtSigmaPipeline", "PixArtTransformer2DModel", PIXART, scheduler=dpm),
    Row(
        "SanaPipeline", "SanaTransformer2DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1,
             num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH, sample_size=8),
        scheduler=flow_dpm,
    ),
    Row(
        "Lumina2Pipeline", "Lumina2Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
             num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32),
             cap_feat_dim=WIDTH),
        call=dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, TOKENS, dtype=torch.int64)),
    ),
    Row(
        "LuminaPipeline", "LuminaNextDiT2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_attention_heads=3, num_kv_heads=1,
             multiple_of=16, cross_attention_dim=WIDTH),
    ),
    Row(
        "CogView4Pipeline", "CogView4Transformer2DModel",
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
             text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, rope_axes_dim=(64, 64)),
    ),
    Row(
        "CogView3PlusPipeline", "CogView3PlusTransformer2DModel",
        dict(patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
             text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, sample_size=8),
        scheduler=ddim,
    ),
    Row(
        "CogVideoXPipeline", "CogVideoXTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
             text_embed_dim=WIDTH, num_layers=1, sample_width=8, sample_height=8, sample_frames=9,
             max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True),
        scheduler=ddim,
    ),
    Row(
        "LTXPipeline", "LTXVideoTransformer3DModel",
        dict(in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
             num_layers=1, caption_channels=WIDTH),
        scheduler=dynamic_euler,
    ),
    Row(
        "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=WIDTH,
             pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 8)),
        call={"true_cfg_scale": 2.0}, off={"true_cfg_scale": 1.0},
    ),
    Row(
        "MochiPipeline", "MochiTransformer3DModel",
        dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
             text_embed_dim=WIDTH, time_embed_dim=4, max_sequence_length=TOKENS),
        call={"num_frames": 7},
    ),
    Row(
        "AllegroPipeline", "AllegroTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
             cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=WIDTH),
        scheduler=flow_dpm, call={"num_frames": 8},
    ),
    Row(
        "LattePipeline", "LatteTransformer3DModel",
        dict(sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
             in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
             num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2),
        scheduler=dpm, call={"video_length": 2},
    ),
    Row(
        "CosmosTextToWorldPipeline", "CosmosTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=WIDTH,
             adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=True, extra_pos_embed_type=None),
        parts=checker, scheduler=edm,
    ),
    Row(
        "PRXPipeline", "PRXTransformer2DModel",
        dict(in_channels=4, patch_size=1, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2]),
    ),
    Row(
        "ZImagePipeline", "ZImageTransformer2DModel",
        dict(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
             n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64]),
        call={"prompt_embeds": [noise(TOKENS, WIDTH)], "negative_prompt_embeds": [noise(TOKENS, WIDTH, seed=1)]},
        off={"guidance_scale": 0.0},
    ),
)  # fmt: skip

PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
MASK = (torch.arange(64) < 32).float().expand(1, 1, 64, 64).contiguous()
HIDREAM = dict(
    patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4,
    caption_channels=[WIDTH, 16], text_emb_dim=POOLED, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
)  # fmt: skip
KANDINSKY = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=POOLED, time_dim=16, model_dim=32, ff_dim=32,
    num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6), attention_type="regular",
)  # fmt: skip
KANDINSKY_CALL = dict(
    prompt_embeds_qwen=noise(1, TOKENS, WIDTH), negative_prompt_embeds_qwen=noise(1, TOKENS, WIDTH, seed=1),
    prompt_embeds_clip=noise(1, POOLED, seed=2), negative_prompt_embeds_clip=noise(1, POOLED, seed=3),
    prompt_cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32),
    negative_prompt_cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32),
)  # fmt: skip
SECOND_TEXT = dict(
    prompt_embeds_2=noise(1, TOKENS, WIDTH, seed=4), negative_prompt_embeds_2=noise(1, TOKENS, WIDTH, seed=5),
)  # fmt: skip
SECOND_MASKS = ("prompt_attention_mask_2", "negative_prompt_attention_mask_2")


def row_like(
    rows: tuple[Row, ...], of: str, pipeline: str, config: dict[str, Any] | None = None, **changes: Any
) -> Row:
    """A row of another pipeline class on the transformer of `of`, with further arguments of its call."""
    row = next(row for row in rows if row.pipeline == of)
    fields = {name: changes.pop(name) for name in ("parts", "off", "scheduler", "settings") if name in changes}
    return replace(row, pipeline=pipeline, config=row.config | (config or {}), call=row.call | changes, **fields)


def like(of: str, pipeline: str, config: dict[str, Any] | None = None, **changes: Any) -> Row:
    """See `row_like`, of the rows above."""
    return row_like(TEXT_ROWS, of, pipeline, config, **changes)


MORE_ROWS = (
    like("FluxPipeline", "FluxImg2ImgPipeline", image=PICTURE, strength=0.7, parts=image_vae),
    like("FluxPipeline", "FluxInpaintPipeline", image=PICTURE, mask_image=MASK, strength=0.7, parts=image_vae),
    like("FluxPipeline", "FluxKontextPipeline", image=PICTURE, max_area=64 * 64, _auto_resize=False, parts=image_vae),
    like("FluxPipeline", "FluxControlPipeline", {"in_channels": 32, "out_channels": 16}, control_image=PICTURE,
         true_cfg_scale=DROP, parts=image_vae),
    like("FluxPipeline", "FluxFillPipeline", {"in_channels": 288, "out_channels": 16}, image=PICTURE, mask_image=MASK,
         true_cfg_scale=DROP, parts=image_vae),
    like("ChromaPipeline", "ChromaImg2ImgPipeline", image=PICTURE, strength=0.7, parts=image_vae),
    like("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", image=PICTURE, strength=0.7, parts=image_vae),
    like("ZImagePipeline", "ZImageImg2ImgPipeline", image=PICTURE, strength=0.7, parts=image_vae),
    like("ZImagePipeline", "ZImageInpaintPipeline", image=PICTURE, mask_image=MASK, strength=0.7, parts=image_vae),
    like("WanPipeline", "WanImageToVideoPipeline", {"in_channels": 36, "out_channels": 16}, image=PICTURE, parts=video_vae),
    Row(
        "HunyuanDiTPipeline", "HunyuanDiT2DModel",
        dict(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
             cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=4, hidden_size=24, text_len=TOKENS,
             text_len_t5=TOKENS),
        call={**SECOND_TEXT, **dict.fromkeys(SECOND_MASKS, torch.ones(1, TOKENS))}, scheduler=dpm,
    ),
    Row(
        "HiDreamImagePipeline", "HiDreamImageTransformer2DModel", HIDREAM, settings={"default_sample_size": 8},
        call={
            "prompt_embeds_t5": noise(1, TOKENS, WIDTH), "negative_prompt_embeds_t5": noise(1, TOKENS, WIDTH, seed=1),
            "prompt_embeds_llama3": noise(2, 1, TOKENS, 16), "negative_prompt_embeds_llama3": noise(2, 1, TOKENS, 16, seed=1),
        },
    ),
    Row("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", KANDINSKY, call=KANDINSKY_CALL),
    Row(
        "Kandinsky5T2IPipeline", "Kandinsky5Transformer3DModel", KANDINSKY, call=KANDINSKY_CALL,
        settings={"resolutions": [(64, 64)]},
    ),
    Row(
        "LTX2Pipeline", "LTX2VideoTransformer3DModel",
        dict(in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
             audio_in_channels=128, audio_out_channels=128, audio_num_attention_heads=2, audio_attention_head_dim=12,
             audio_cross_attention_dim=24, num_layers=1, caption_channels=WIDTH),
        call={"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0},
        off={"guidance_scale": 1.0, "audio_guidance_scale": 1.0}, scheduler=dynamic_euler, parts=picture_and_sound,
    ),
    Row(
        "SanaVideoPipeline", "SanaVideoTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
             num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH,
             sample_size=8, rope_max_seq_len=32),
        call={"frames": 9}, scheduler=flow_dpm,
    ),
)  # fmt: skip
ROWS = (*TEXT_ROWS, *MORE_ROWS)
