"""Rows of the matrix: images from images, masks, references and controls, and families of images that came later."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.erta.matrix_parts import (
    deep_vae,
    dynamic_euler,
    flux2_vae,
    guiders,
    image_vae,
    qwen_pooling,
    qwen_vae,
    scm,
)
from tests.erta.matrix_rows import (
    AXES,
    DROP,
    MASK,
    PICTURE,
    POOLED,
    ROWS,
    SECOND_TEXT,
    TEXT,
    TOKENS,
    WIDTH,
    Row,
    noise,
    row_like,
)


def like(of: str, pipeline: str, config: dict[str, Any] | None = None, **changes: Any) -> Row:
    """See `row_like`, of the rows before these."""
    return row_like(ROWS, of, pipeline, config, **changes)


def with_control(kind: str, parts: Any = image_vae, **config: Any) -> Any:
    """What makes a pipeline's parts: a VAE and a control net of these sizes."""

    def made() -> dict[str, Any]:
        torch.manual_seed(2)
        net = getattr(diffusers, kind)(**config).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
        return {**parts(), "controlnet": net}

    return made


PICTURE_FILE = Image.new("RGB", (64, 64), (40, 100, 160))
FLUX_SIZES = dict(in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=POOLED, **AXES, **TEXT)
FLUX_NET = with_control("FluxControlNetModel", **FLUX_SIZES)
TO_IMAGE = dict(image=PICTURE, strength=0.7)
TO_MASK = dict(image=PICTURE, mask_image=MASK, strength=0.7)
UNGUIDED = dict(true_cfg_scale=DROP)

FLUX_ROWS = (
    like("FluxKontextPipeline", "FluxKontextInpaintPipeline", mask_image=MASK, strength=0.7),
    like("FluxControlPipeline", "FluxControlImg2ImgPipeline", **TO_IMAGE),
    like("FluxControlPipeline", "FluxControlInpaintPipeline", **TO_MASK),
    like("FluxPipeline", "FluxControlNetPipeline", control_image=PICTURE, parts=FLUX_NET),
    like("FluxPipeline", "FluxControlNetImg2ImgPipeline", control_image=PICTURE, parts=FLUX_NET, **TO_IMAGE, **UNGUIDED),
    like("FluxPipeline", "FluxControlNetInpaintPipeline", control_image=PICTURE, parts=FLUX_NET, **TO_MASK, **UNGUIDED),
    like("Flux2Pipeline", "Flux2KleinPipeline", {"guidance_embeds": False}, parts=flux2_vae),
    like("Flux2Pipeline", "Flux2KleinInpaintPipeline", {"guidance_embeds": False}, parts=flux2_vae, **TO_MASK),
    like("Flux2Pipeline", "Flux2KleinKVPipeline", {"guidance_embeds": False}, parts=flux2_vae, image=PICTURE_FILE,
         guidance_scale=DROP),
)  # fmt: skip

QWEN_SIZES = dict(in_channels=16, out_channels=4, num_layers=1, **AXES, **TEXT)
QWEN_ROWS = (
    like("QwenImagePipeline", "QwenImageImg2ImgPipeline", parts=qwen_vae, **TO_IMAGE),
    like("QwenImagePipeline", "QwenImageInpaintPipeline", parts=qwen_vae, **TO_MASK),
    like("QwenImagePipeline", "QwenImageEditPipeline", parts=qwen_pooling, image=PICTURE_FILE, height=1024, width=1024),
    like("QwenImagePipeline", "QwenImageEditPlusPipeline", parts=qwen_pooling, image=PICTURE_FILE, height=1024, width=1024),
    like("QwenImagePipeline", "QwenImageControlNetPipeline", control_image=PICTURE,
         parts=with_control("QwenImageControlNetModel", qwen_vae, **QWEN_SIZES)),
    like("QwenImagePipeline", "QwenImageControlNetInpaintPipeline", control_image=PICTURE, control_mask=MASK,
         parts=with_control("QwenImageControlNetModel", qwen_vae, extra_condition_channels=4, **QWEN_SIZES)),
)  # fmt: skip

SD3_SIZES = dict(
    sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
    caption_projection_dim=16, pooled_projection_dim=POOLED, out_channels=4, **TEXT,
)  # fmt: skip
DIT_NET = dict(
    sample_size=8, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4, cross_attention_dim=WIDTH,
    cross_attention_dim_t5=WIDTH, pooled_projection_dim=4, hidden_size=24, text_len=TOKENS, text_len_t5=TOKENS,
)  # fmt: skip
SANA_SIZES = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1, num_cross_attention_heads=2,
    cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=WIDTH, sample_size=8,
)  # fmt: skip
Z_SIZES = dict(
    control_layers_places=[0], control_refiner_layers_places=[0], dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2
)
Z_NET = with_control("ZImageControlNetModel", **Z_SIZES, control_in_dim=4)
SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
OLDER_ROWS = (
    like("StableDiffusion3Pipeline", "StableDiffusion3InpaintPipeline", {"in_channels": 16, "out_channels": 16},
         parts=partial(image_vae, 16), **TO_MASK),
    like("StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline", {"num_layers": 2}, off={"guidance_scale": 1.0, "pag_scale": 0.0}),
    like("StableDiffusion3Pipeline", "StableDiffusion3PAGImg2ImgPipeline", {"num_layers": 2}, parts=image_vae, **TO_IMAGE,
         off={"guidance_scale": 1.0, "pag_scale": 0.0}),
    like("StableDiffusion3Pipeline", "StableDiffusion3ControlNetPipeline", control_image=PICTURE,
         parts=with_control("SD3ControlNetModel", **SD3_SIZES)),
    like("StableDiffusion3Pipeline", "StableDiffusion3ControlNetInpaintingPipeline", control_image=PICTURE, control_mask=MASK,
         parts=with_control("SD3ControlNetModel", extra_conditioning_channels=1, **SD3_SIZES)),
    like("PixArtSigmaPipeline", "PixArtSigmaPAGPipeline", {"num_layers": 2}, off={"guidance_scale": 1.0, "pag_scale": 0.0}),
    like("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline", {"num_layers": 14}, off={"guidance_scale": 1.0, "pag_scale": 0.0}),
    like("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", {"num_layers": 4}, control_image=PICTURE,
         parts=with_control("HunyuanDiT2DControlNetModel", transformer_num_layers=4, **DIT_NET)),
    like("SanaPipeline", "SanaPAGPipeline", {"num_layers": 2}, off={"guidance_scale": 1.0, "pag_scale": 0.0}),
    like("SanaPipeline", "SanaControlNetPipeline", control_image=PICTURE, parts=with_control("SanaControlNetModel", deep_vae, **SANA_SIZES)),
    like("SanaPipeline", "SanaSprintPipeline", SPRINT, scheduler=scm, intermediate_timesteps=None),
    like("SanaPipeline", "SanaSprintImg2ImgPipeline", SPRINT, scheduler=scm, parts=deep_vae,
         intermediate_timesteps=None, **TO_IMAGE),
    like("CogView4Pipeline", "CogView4ControlPipeline", {"in_channels": 8}, control_image=PICTURE, parts=image_vae),
    like("ZImagePipeline", "ZImageControlNetPipeline", control_image=PICTURE, parts=Z_NET),
    like("ZImagePipeline", "ZImageControlNetInpaintPipeline", control_image=PICTURE, image=PICTURE, mask_image=MASK,
         parts=with_control("ZImageControlNetModel", **Z_SIZES, control_in_dim=9)),
    like("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline", {"visual_cond": True}, image=PICTURE, parts=image_vae),
)  # fmt: skip

NEWER_ROWS = (
    Row(
        "HunyuanImagePipeline", "HunyuanImageTransformer2DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
             rope_axes_dim=(4, 4)),
        call={**SECOND_TEXT, **dict.fromkeys(("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), torch.ones(1, TOKENS))},
        parts=guiders,
    ),
    Row(
        "Krea2Pipeline", "Krea2Transformer2DModel",
        dict(in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
             timestep_embed_dim=8, text_hidden_dim=WIDTH, num_text_layers=3, text_num_attention_heads=2,
             text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
             axes_dims_rope=(4, 2, 2), rope_theta=1000.0),
        call={"prompt_embeds": noise(1, TOKENS, 3, WIDTH), "negative_prompt_embeds": noise(1, TOKENS, 3, WIDTH, seed=1)},
        scheduler=dynamic_euler,
    ),
    Row(
        "NucleusMoEImagePipeline", "NucleusMoEImageTransformer2DModel",
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
             joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0, 8.0]),
        scheduler=dynamic_euler,
    ),
    Row(
        "ErnieImagePipeline", "ErnieImageTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16,
             text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6)),
        call={"use_pe": False}, parts=flux2_vae,
    ),
    Row(
        "PRXPixelPipeline", "PRXTransformer2DModel",
        dict(patch_size=4, in_channels=3, context_in_dim=WIDTH, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[2, 2],
             bottleneck_size=8, resolution_embeds=True),
    ),
)  # fmt: skip
IMAGE_ROWS = (*FLUX_ROWS, *QWEN_ROWS, *OLDER_ROWS, *NEWER_ROWS)
