"""Rows of the matrix: videos from images, videos and controls, families of video that came later, and sound."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from experiments.models.open_sora.sizes import rectified_flow
from tests.erta.matrix_parts import (
    cog_vae,
    cosmos_vae,
    ddim,
    edm,
    euler,
    flow_map,
    guided_hunyuan_15,
    guided_wan,
    hunyuan_vae,
    karras_euler,
    ltx_vae,
    magvit_vae,
    open_sora_parts,
    picture_and_sound_vae,
    seeing,
    seeing_siglip,
    unipc,
    wan_vae,
    wan_vae_and_checker,
)
from tests.erta.matrix_rows import (
    DROP,
    PICTURE,
    POOLED,
    ROWS,
    SECOND_TEXT,
    TOKENS,
    WIDTH,
    Row,
    row_like,
)
from tests.pipelines import TINY_STDIT3


def like(of: str, pipeline: str, config: dict[str, Any] | None = None, **changes: Any) -> Row:
    """See `row_like`, of the rows before these."""
    return row_like(ROWS, of, pipeline, config, **changes)


CLIP = torch.rand(1, 9, 3, 64, 64, generator=torch.Generator().manual_seed(6))
PILS = [Image.new("RGB", (64, 64), (20 * k, 100, 200 - 20 * k)) for k in range(9)]
WIDE = {"in_channels": 16, "out_channels": 16}
FROM_IMAGE = {"in_channels": 36, "out_channels": 16}
COSMOS = dict(
    in_channels=17, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=WIDTH,
    adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=True, extra_pos_embed_type=None,
)  # fmt: skip

OPEN_SORA_ROWS = (
    Row("OpenSoraPipeline", "STDiT3Transformer3DModel", TINY_STDIT3,
        call={"prompt": "a small red circle", "num_frames": 17, "max_sequence_length": 16}, scheduler=rectified_flow,
        parts=open_sora_parts),
)  # fmt: skip

WAN_ROWS = (
    like("WanPipeline", "WanVideoToVideoPipeline", WIDE, video=CLIP, strength=0.7, parts=wan_vae, num_frames=DROP),
    Row(
        "WanVACEPipeline", "WanVACETransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=2,
             rope_max_seq_len=32, vace_layers=[0], vace_in_channels=96, **WIDE),
        scheduler=unipc, parts=wan_vae,
    ),
    like("WanPipeline", "LucyEditPipeline", {"in_channels": 32, "out_channels": 16}, video=PILS, parts=wan_vae),
    Row(
        "ChronoEditPipeline", "ChronoEditTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=1,
             rope_max_seq_len=32, image_dim=4, **FROM_IMAGE),
        call={"image": PICTURE, "num_frames": 5}, scheduler=unipc, parts=seeing(wan_vae),
    ),
    like("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline", {**FROM_IMAGE, "image_dim": 4}, image=PICTURE,
         parts=seeing(wan_vae)),
    like("SkyReelsV2Pipeline", "SkyReelsV2DiffusionForcingPipeline", WIDE, prompt=None, parts=wan_vae),
    like("SkyReelsV2Pipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline", WIDE, image=PICTURE, prompt=None, parts=wan_vae),
    Row(
        "AnyFlowPipeline", "AnyFlowTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=32, ffn_dim=32, num_layers=1,
             rope_max_seq_len=32, gate_value=0.25, deltatime_type="r", **WIDE),
        scheduler=flow_map, parts=wan_vae,
    ),
)  # fmt: skip

COG_ROWS = (
    like("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", {"in_channels": 8}, image=PICTURE, parts=cog_vae),
    like("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline", video=PILS, strength=0.7, num_frames=DROP, parts=cog_vae),
    like("CogVideoXPipeline", "CogVideoXFunControlPipeline", {"in_channels": 8}, control_video=PILS, num_frames=DROP,
         parts=cog_vae),
    Row(
        "ConsisIDPipeline", "ConsisIDTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2, text_embed_dim=WIDTH,
             num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
             max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True, cross_attn_interval=1, is_kps=False,
             is_train_face=True, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5,
             LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=21, LFE_ff_mult=1,
             LFE_num_scale=1),
        call={"image": PICTURE, "id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2)}, scheduler=ddim,
        parts=cog_vae,
    ),
)  # fmt: skip

COSMOS_ROWS = (
    Row("Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", {**COSMOS, "in_channels": 16}, scheduler=karras_euler,
        parts=wan_vae_and_checker),
    Row("Cosmos2VideoToWorldPipeline", "CosmosTransformer3DModel", COSMOS, call={"image": PICTURE}, scheduler=karras_euler,
        parts=wan_vae_and_checker),
    Row("Cosmos2_5_PredictBasePipeline", "CosmosTransformer3DModel", COSMOS, call={"image": PILS[0]}, scheduler=unipc,
        parts=wan_vae_and_checker),
)  # fmt: skip

LTX = dict(
    in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=1,
    caption_channels=WIDTH,
)  # fmt: skip
HUNYUAN = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1,
    patch_size_t=1, text_embed_dim=WIDTH, pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 8), out_channels=4,
)  # fmt: skip
HUNYUAN_15 = dict(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
    patch_size=1, patch_size_t=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=12, rope_axes_dim=(2, 2, 4),
    target_size=16,
)  # fmt: skip
EASY = dict(
    num_attention_heads=2, attention_head_dim=16, out_channels=4, time_embed_dim=2, text_embed_dim=WIDTH, num_layers=1,
    sample_width=8, sample_height=8, patch_size=2,
)  # fmt: skip
MOTIF = dict(
    in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
    mlp_ratio=4.0, patch_size=1, patch_size_t=1, qk_norm="rms_norm", text_embed_dim=WIDTH, rope_axes_dim=(4, 4, 4),
)  # fmt: skip

BOTH_TEXTS = {
    **SECOND_TEXT,
    **dict.fromkeys(("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), torch.ones(1, TOKENS)),
}

LATER_ROWS = (
    like("LTXPipeline", "LTXImageToVideoPipeline", image=PICTURE, parts=ltx_vae),
    like("LTXPipeline", "LTXConditionPipeline", image=PICTURE, parts=ltx_vae, scheduler=euler),
    Row("HunyuanVideoImageToVideoPipeline", "HunyuanVideoTransformer3DModel",
        dict(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat", **HUNYUAN),
        call={"image": PICTURE, "true_cfg_scale": 2.0}, off={"true_cfg_scale": 1.0}, parts=hunyuan_vae),
    Row("HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideoTransformer3DModel",
        dict(in_channels=8, guidance_embeds=True, **HUNYUAN), call={"image": PICTURE, "true_cfg_scale": 2.0},
        off={"true_cfg_scale": 1.0}, parts=hunyuan_vae),
    Row("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", dict(in_channels=4, **EASY), parts=magvit_vae),
    like("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", {"visual_cond": True}, image=PICTURE, parts=hunyuan_vae, num_frames=25),
    Row("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", {**HUNYUAN_15, "task_type": "t2v"}, call=BOTH_TEXTS,
        parts=guided_hunyuan_15),
    Row("HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15Transformer3DModel", {**HUNYUAN_15, "task_type": "i2v"},
        call={**BOTH_TEXTS, "image": PILS[0]}, parts=seeing_siglip(guided_hunyuan_15)),
    Row("MotifVideoPipeline", "MotifVideoTransformer3DModel", MOTIF, parts=guided_wan),
    like("LTX2Pipeline", "LTX2ImageToVideoPipeline", image=PICTURE, image_crf=0, parts=picture_and_sound_vae, height=32, width=32,
         num_frames=5),
    like("LTX2Pipeline", "LTX2ConditionPipeline", parts=picture_and_sound_vae, height=32, width=32, num_frames=5),
    like("LTX2Pipeline", "LTX2InContextPipeline", parts=picture_and_sound_vae, height=32, width=32, num_frames=5),
    Row("CosmosVideoToWorldPipeline", "CosmosTransformer3DModel", {**COSMOS, "in_channels": 5, "out_channels": 4},
        call={"image": PICTURE}, scheduler=edm, parts=cosmos_vae),
    like("SanaVideoPipeline", "SanaImageToVideoPipeline", WIDE, image=PICTURE, scheduler=euler, parts=wan_vae),
)  # fmt: skip

VIDEO_ROWS = (*OPEN_SORA_ROWS, *WAN_ROWS, *COG_ROWS, *COSMOS_ROWS, *LATER_ROWS)
