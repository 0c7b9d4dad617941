"""`experiment=model_card model=…`: what a cache on a model costs and saves, counted without its weights.

The real transformer is built on the meta device, where tensors have shapes and no memory, and its forward is
counted there: no GPU, no download, a few seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from analysis.records import ModelCardRecord
from erta.guidance import true_scale_of
from erta.options import SITES
from experiments.models.architectures import describe, forward_inputs, known_class
from experiments.models.call import call_kwargs
from experiments.models.classes import class_named
from experiments.models.costs import count_flops, flops_without_blocks
from experiments.output import console, tracking
from experiments.output.provenance import describe_made
from experiments.output.run_folder import finish

FLOPS_PER_PAIR = 40  # and element, of the statistics of two steps: counted by hand, generously


def run(cfg: DictConfig, folder: Path) -> None:
    """Print the card and write it to `record.json`."""
    card = model_card(cfg)
    finish(folder, card)
    console.table(f"{cfg.model.name}, {cfg.model.num_inference_steps} steps", ["", "counted"], shown(card))
    console.note(f"card: {folder / 'record.json'}")
    with tracking.start(cfg, folder) as tracker:
        tracker.finish({key: value for key, value in vars(card).items() if key not in ("config", "versions")})


def model_card(cfg: DictConfig) -> ModelCardRecord:
    """Parameters, sizes, FLOPs (two per multiply-add) and the expected price of a calibration.

    Of two equal transformers `parameters` counts both; a step runs one of them, and the cache keeps residuals of one.
    `calibration_generations` is a calibration's time for one prompt over that of one generation, in FLOPs: at
    `output` the statistics take a few passes over the latent, at `blocks` every pair runs all but the blocks once.
    """
    about, steps = describe(cfg), cfg.model.num_inference_steps
    with torch.device("meta"):
        transformer: nn.Module = class_named(about["class"])(**about["transformer"])
        inputs = forward_inputs(about, transformer.config)
        flops, velocity = count_flops(transformer, inputs)
        parameters = sum(p.numel() for p in transformer.parameters())
        head_flops = flops_without_blocks(transformer, inputs)
    dtypes = {"output": about.get("velocity_dtype", cfg.model.dtype), "blocks": cfg.model.dtype}
    itemsize = {site: getattr(torch, dtype).itemsize for site, dtype in dtypes.items()}
    kept = {"output": velocity.numel(), "blocks": _token_elements(about, transformer.config)}
    forwards = forwards_of(about, cfg)
    window = min(cfg.calibration.window, steps - 1)
    passes = {"output": FLOPS_PER_PAIR * velocity.numel() * window / flops, "blocks": None}
    if head_flops is not None:
        passes["blocks"] = window * head_flops / flops
    transformers = about.get("transformers", 1)
    return ModelCardRecord(
        **describe_made(cfg),
        transformer=about["class"],
        transformers=transformers,
        parameters=transformers * parameters,
        latent_shape=list(inputs["hidden_states"].shape[1:]),
        forwards_per_step=forwards,
        flops_per_forward=flops,
        flops_per_step=forwards * flops,
        flops_per_sample=steps * forwards * flops,
        cache_dtype=cfg.model.dtype,
        velocity_dtype=about.get("velocity_dtype"),
        cache_bytes={site: None if kept[site] is None else forwards * kept[site] * itemsize[site] for site in SITES},
        reused_step_share={"output": 0.0, "blocks": None if head_flops is None else head_flops / flops},
        calibration_generations={site: None if passes[site] is None else 1 + passes[site] for site in SITES},
    )


def shown(card: ModelCardRecord) -> list[list[str]]:
    """The card as rows of text."""

    def by_site(key: str, form: str) -> str:
        known = {site: value for site, value in getattr(card, key).items() if value is not None}
        return ", ".join(f"{site} {value:{form}}" for site, value in known.items())

    megabytes = {site: None if count is None else count / 1e6 for site, count in card.cache_bytes.items()}
    at_output = "" if card.velocity_dtype is None else f" (output {card.velocity_dtype})"
    count, billions = card.transformers, card.parameters / 1e9
    each = f" in {count} of {billions / count:.3f}, one of which runs at a step" if count > 1 else ""
    return [
        ["transformer", card.transformer if count == 1 else f"{count} {card.transformer}"],
        ["parameters", f"{billions:.3f} billion{each}"],
        ["latent", " x ".join(map(str, card.latent_shape))],
        ["forwards a step", str(card.forwards_per_step)],
        ["TFLOPs a step", f"{card.flops_per_step / 1e12:.4g}"],
        ["TFLOPs a sample", f"{card.flops_per_sample / 1e12:.4g}"],
        [
            f"cache, {card.cache_dtype}{at_output}",
            ", ".join(f"{s} {v:.3g} MB" for s, v in megabytes.items() if v is not None),
        ],
        ["FLOPs of a reused step", by_site("reused_step_share", ".3%")],
        ["calibration of a prompt, generations", by_site("calibration_generations", ".3f")],
    ]


def forwards_of(about: dict[str, Any], cfg: DictConfig) -> int:
    """Of one step: with true guidance beside an embedded one two, else what the class makes where guidance is on."""
    if true_scale_of(call_kwargs(cfg)) is not None:
        return 2
    return about["forwards"] if cfg.model.guidance_scale > 1 else 1


def _token_elements(about: dict[str, Any], config: Any) -> int | None:
    """Elements of the token residual of one branch; None where the `blocks` site is not known."""
    if known_class(about).blocks is None:
        return None
    frames, height, width = about["size"]
    patch = getattr(config, "patch_size", None)
    side = patch[-1] if isinstance(patch, (list, tuple)) else 2  # 2: FLUX packs 2x2 latents itself
    return frames * (height // side) * (width // side) * config.num_attention_heads * config.attention_head_dim
