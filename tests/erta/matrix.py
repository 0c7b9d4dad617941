"""Which pipelines: a tiny random instance of each pipeline class that is described here, and what the library does with it.

`python -m tests.erta.matrix` writes the page `erta/PIPELINES.md`; the slow test compares it with what it finds. A pipeline's
arguments are filled in by its signature, with embeddings in place of text; a row says what else its class needs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import erta

PAGE = Path(erta.__file__).with_name("PIPELINES.md")
STEPS, COMPUTED, TOKENS, WIDTH, POOLED = 6, 3, 5, 24, 20
WORKS, UNGUIDED, REFUSED, CRASHES = "works", "works with guidance off", "refused", "crashes"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def dynamic_euler() -> Any:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def unipc() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def dpm() -> Any:
    return DPMSolverMultistepScheduler()


def flow_dpm() -> Any:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def ddim() -> Any:
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


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


@dataclass(frozen=True)
class Row:
    """A pipeline class, its transformer's class and sizes, and what of its call is its own."""

    pipeline: str
    transformer: str
    config: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = euler
    off: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    quick: bool = True  # part of the default slow suite

    def build(self) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and the arguments of a call without output type and generator."""
        kind = getattr(diffusers, self.pipeline)
        torch.manual_seed(0)
        transformer = getattr(diffusers, self.transformer)(**self.config).eval()
        with torch.no_grad():  # some outputs start at zero
            for parameter in transformer.parameters():
                if parameter.numel() and not parameter.any():
                    parameter.normal_(std=0.2)
        parameters = inspect.signature(kind.__init__).parameters
        absent = [name for name, about in parameters.items() if about.default is about.empty and name != "self"]
        parts = {**dict.fromkeys(absent), "transformer": transformer, "scheduler": self.scheduler()}
        pipe = kind(**parts)
        pipe.set_progress_bar_config(disable=True)
        has = inspect.signature(kind.__call__).parameters
        call = {name: value for name, value in given_by_name().items() if name in has}
        call |= self.call
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

ROWS = (
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
        dict(in_channels=16, num_layers=1, num_single_layers=1, **AXES, **TEXT),
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
             num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False),
        scheduler=dpm, call={"video_length": 2},
    ),
    Row(
        "Cosmos2TextToImagePipeline", "CosmosTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=WIDTH,
             adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=True, extra_pos_embed_type=None),
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


@dataclass(frozen=True)
class Verdict:
    """What the library does with a pipeline class; `branches` as a calibration names them."""

    status: str
    branches: str = ""
    why: str = ""


def verdict_of(row: Row) -> Verdict:
    """Build the row's pipeline and try it, with guidance and, if that is refused, without."""
    pipe, call = row.build()
    try:
        return Verdict(WORKS, ", ".join(attempt(pipe, call)))
    except Exception as error:
        refusal = Verdict(REFUSED if isinstance(error, erta.ErtaError) else CRASHES, why=one_line(error))
    pipe, call = row.build()
    try:
        return Verdict(UNGUIDED, ", ".join(attempt(pipe, {**call, **row.off})), refusal.why)
    except Exception:
        return refusal


def one_line(error: Exception) -> str:
    """An error's text for a table's cell."""
    text = " ".join(str(error).replace("|", "/").split())
    text = text[text.find("): ") + 3 :] if text.startswith("prompt 1 (") else text
    named = text if isinstance(error, erta.ErtaError) else f"{type(error).__name__}: {text}"
    return named if len(named) < 160 else f"{named[:159]}…"


def attempt(pipe: Any, call: dict[str, Any]) -> list[str]:
    """All checks of one pipeline; its branches. Raises what the library, or the pipeline, raises, AssertionError if wrong."""

    def latents() -> torch.Tensor:
        with torch.no_grad():
            return pipe(generator=torch.Generator().manual_seed(3), output_type="latent", **call)[0]

    plain, kind = latents(), type(pipe)
    assert torch.isfinite(plain).all() and torch.equal(latents(), plain), "the pipeline does not repeat itself"
    calibration = erta.calibrate(pipe, window=STEPS, **call)
    options = {"adjust_time": calibration.signature["grid"] == "sigmas"}
    with erta.cached(pipe, calibration.plan(steps=calibration.num_steps, **options)):
        assert torch.equal(latents(), plain), "nothing reused is not the uncached run"
    with erta.cached(pipe, calibration.plan(steps=COMPUTED, **options)) as trace:
        cached = latents()
        assert set(trace.forwards.values()) == {COMPUTED}, "other forwards than planned"
        assert torch.equal(latents(), cached), "the second call is another"
    assert not torch.equal(cached, plain), "nothing was reused"
    plan = calibration.plan(steps=COMPUTED, reuse="velocity", adjust_time=False, rectify=False)
    with erta.cached(pipe, plan) as trace:
        found = latents()
    wanted = emulated(pipe, plan.mask, len(trace.executed), latents)
    assert torch.equal(found, wanted), "velocity reuse is not what an emulation gives"
    assert type(pipe) is kind and torch.equal(latents(), plain), "the pipeline is not as before"
    return calibration.signature["branches"]


def emulated(pipe: Any, mask: tuple[bool, ...], forwards: int, latents: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The run with each forward's last computed output in its place, by a wrapper that knows nothing of the library."""
    own, count = pipe.transformer.forward, 0
    kept: dict[int, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        step, place = divmod(count, forwards)
        count += 1
        if mask[step]:
            kept[place] = own(*args, **kwargs)
        return kept[place]

    pipe.transformer.forward = forward
    try:
        return latents()
    finally:
        del pipe.transformer.forward


def verdicts(rows: tuple[Row, ...] = ROWS) -> dict[str, Verdict]:
    """By pipeline class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {row.pipeline: verdict_of(row) for row in rows}


def untried() -> list[str]:
    """Pipeline classes of the installed diffusers that have a transformer and no row here."""
    known = {row.pipeline for row in ROWS}
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and name not in known]
    return sorted(name for name in names if has_transformer(getattr(diffusers, name)))


def has_transformer(kind: Any) -> bool:
    """Whether a pipeline class is made with a transformer."""
    try:
        return "transformer" in inspect.signature(kind.__init__).parameters
    except (TypeError, ValueError):
        return False


def page(found: dict[str, Verdict]) -> str:
    """The page, as it stands in the library's folder."""
    rows = {row.pipeline: row for row in ROWS}
    lines = [
        "# Which pipelines",
        "",
        f'What `site="output"` does with tiny random instances of the pipeline classes of diffusers {diffusers.__version__}. Made by',
        "`python -m tests.erta.matrix`, and checked by a slow test: a pipeline *works* if it calibrates, runs bit for bit as",
        "uncached where nothing is reused, makes the forwards that were planned, repeats itself, reuses velocities as an",
        "independent emulation does, and is as before afterwards.",
        "",
        "| pipeline | transformer | | guidance branches | why not |",
        "|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items(), key=lambda item: item[0].lower()):
        lines.append(f"| {name} | {rows[name].transformer} | {one.status} | {one.branches} | {one.why} |")
    counts = [
        f"{sum(one.status == status for one in found.values())} {status}"
        for status in (WORKS, UNGUIDED, REFUSED, CRASHES)
    ]
    others = untried()
    lines += [
        "",
        f"Of {len(found)}: {', '.join(counts)}.",
        "",
        f"Not tried, {len(others)} more classes with a transformer:",
        "",
    ]
    return "\n".join([*lines, ", ".join(others) + "."]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(verdicts()), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
