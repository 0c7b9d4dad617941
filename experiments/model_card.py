"""`experiment=model_card model=…`: what a cache on a model costs and saves, counted without its weights.

The real transformer is built on the meta device, where tensors have shapes and no memory, and its forward is
counted there: no GPU, no download, a few seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from erta.errors import ErtaError
from erta.site import BLOCK_STACKS, SITES
from experiments import console
from experiments.models import ASSETS
from experiments.record import mark_finished, read_json, write_json

FLOPS_PER_PAIR = 40  # and element, of the statistics of two steps: counted by hand, generously
ARCHITECTURES = Path(__file__).with_name("architectures.yaml")


def run(cfg: DictConfig, folder: Path) -> None:
    """Print the card and write it to `model_card.json`."""
    card = model_card(cfg)
    write_json(folder / "model_card.json", card)
    console.table(f"{cfg.model.name}, {cfg.model.num_inference_steps} steps", ["", "counted"], shown(card))
    console.note(f"card: {folder / 'model_card.json'}")
    mark_finished(folder)


def model_card(cfg: DictConfig) -> dict[str, Any]:
    """Parameters, sizes, FLOPs (two per multiply-add) and the expected price of a calibration.

    Of two equal transformers `parameters` counts both; a step runs one of them, and the cache keeps residuals of one.
    `calibration_generations` is a calibration's time for one prompt over that of one generation, in FLOPs: at
    `output` the statistics take a few passes over the latent, at `blocks` every pair runs all but the blocks once.
    """
    about, steps = describe(cfg), cfg.model.num_inference_steps
    with torch.device("meta"):
        transformer: nn.Module = getattr(diffusers, about["class"])(**about["transformer"])
        inputs = forward_inputs(about, transformer.config)
        flops, velocity = count_flops(transformer, inputs)
        parameters = sum(p.numel() for p in transformer.parameters())
        head_flops = _without_blocks(transformer, about["class"], inputs)
    itemsize = getattr(torch, cfg.model.dtype).itemsize
    kept = {"output": velocity.numel(), "blocks": _token_elements(about, transformer.config)}
    forwards = about["forwards"] if cfg.model.guidance_scale > 1 else 1
    window = min(cfg.calibration.window, steps - 1)
    passes = {"output": FLOPS_PER_PAIR * velocity.numel() * window / flops, "blocks": None}
    if head_flops is not None:
        passes["blocks"] = window * head_flops / flops
    transformers = about.get("transformers", 1)
    return {
        "transformer": about["class"],
        "transformers": transformers,
        "parameters": transformers * parameters,
        "latent_shape": list(inputs["hidden_states"].shape[1:]),
        "forwards_per_step": forwards,
        "flops_per_forward": flops,
        "flops_per_step": forwards * flops,
        "flops_per_sample": steps * forwards * flops,
        "cache_dtype": cfg.model.dtype,
        "cache_bytes": {site: None if kept[site] is None else forwards * kept[site] * itemsize for site in SITES},
        "reused_step_share": {"output": 0.0, "blocks": None if head_flops is None else head_flops / flops},
        "calibration_generations": {site: None if passes[site] is None else 1 + passes[site] for site in SITES},
    }


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Class, configuration and input sizes of a model: an embedded one's from its folder, else as published."""
    model = cfg.model
    known: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(ARCHITECTURES))  # type: ignore[assignment]
    about = known.get(model.name)
    if model.embedded:
        folder = Path(model.path).expanduser() if model.path else ASSETS / model.name
        config = read_json(folder / "transformer" / "config.json")
        vae = read_json(folder / "vae" / "config.json")
        image = model.num_frames is None
        latent = (
            {"channels": vae["latent_channels"], "space": 2 ** (len(vae["block_out_channels"]) - 1), "time": 1}
            if image
            else {
                "channels": vae["z_dim"],
                "space": vae["scale_factor_spatial"],
                "time": vae["scale_factor_temporal"],
            }
        )
        width = config["joint_attention_dim"] if image else config["text_dim"]
        about = {
            "class": config["_class_name"],
            "transformer": {key: value for key, value in config.items() if not key.startswith("_")},
            "latent": latent,
            "text": [model.max_sequence_length or 512, width],
            "forwards": 2 if model.guidance_scale > 1 and not image else 1,
        }
    if about is not None and not model.embedded and model.path is not None:
        console.note(f"the card is that of the published {model.name}; model.path is not read")
    if about is None:
        raise ErtaError(f"no architecture of model={model.name} is known; {ARCHITECTURES.name} has {', '.join(known)}")
    frames = model.num_frames or 1
    latent = about["latent"]
    size = ((frames - 1) // latent["time"] + 1, model.height // latent["space"], model.width // latent["space"])
    return {**about, "size": size}


def forward_inputs(about: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Arguments of one forward of batch 1, as the model's pipeline gives them."""
    frames, height, width = about["size"]
    channels, (positions, text_width) = about["latent"]["channels"], about["text"]
    inputs = {"timestep": torch.empty(1), "encoder_hidden_states": torch.empty(1, positions, text_width)}
    name = about["class"]
    if name == "FluxTransformer2DModel":  # tokens of 2x2 latents
        tokens = height // 2 * (width // 2)
        inputs |= {"img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(positions, 3)}
        inputs |= {"pooled_projections": torch.empty(1, config.pooled_projection_dim), "guidance": torch.empty(1)}
        return {"hidden_states": torch.empty(1, tokens, 4 * channels), **inputs}
    if name == "CogVideoXTransformer3DModel":
        return {"hidden_states": torch.empty(1, frames, channels, height, width), **inputs}
    if name == "HunyuanVideoTransformer3DModel":
        inputs |= {"encoder_attention_mask": torch.ones(1, positions), "guidance": torch.empty(1)}
        inputs |= {"pooled_projections": torch.empty(1, config.pooled_projection_dim)}
    return {"hidden_states": torch.empty(1, channels, frames, height, width), **inputs}


def count_flops(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """FLOPs of a forward as PyTorch counts them (matrix products and convolutions), and its output."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity = transformer(**inputs, return_dict=False)[0]
    return counter.get_total_flops(), velocity


def shown(card: dict[str, Any]) -> list[list[str]]:
    """The card as rows of text."""

    def by_site(key: str, form: str) -> str:
        known = {site: value for site, value in card[key].items() if value is not None}
        return ", ".join(f"{site} {value:{form}}" for site, value in known.items())

    megabytes = {site: None if count is None else count / 1e6 for site, count in card["cache_bytes"].items()}
    count, billions = card["transformers"], card["parameters"] / 1e9
    each = f" in {count} of {billions / count:.3f}, one of which runs at a step" if count > 1 else ""
    return [
        ["transformer", card["transformer"] if count == 1 else f"{count} {card['transformer']}"],
        ["parameters", f"{billions:.3f} billion{each}"],
        ["latent", " x ".join(map(str, card["latent_shape"]))],
        ["forwards a step", str(card["forwards_per_step"])],
        ["TFLOPs a step", f"{card['flops_per_step'] / 1e12:.4g}"],
        ["TFLOPs a sample", f"{card['flops_per_sample'] / 1e12:.4g}"],
        [f"cache, {card['cache_dtype']}", ", ".join(f"{s} {v:.3g} MB" for s, v in megabytes.items() if v is not None)],
        ["FLOPs of a reused step", by_site("reused_step_share", ".3%")],
        ["calibration of a prompt, generations", by_site("calibration_generations", ".3f")],
    ]


def _without_blocks(transformer: nn.Module, name: str, inputs: dict[str, torch.Tensor]) -> int | None:
    """FLOPs of what is left at a step that the `blocks` site reuses; None where that site is not known."""
    if name not in BLOCK_STACKS:
        return None
    for blocks in BLOCK_STACKS[name].lists:
        setattr(transformer, blocks, nn.ModuleList())
    return count_flops(transformer, inputs)[0]


def _token_elements(about: dict[str, Any], config: Any) -> int | None:
    """Elements of the token residual of one branch; None where the `blocks` site is not known."""
    if about["class"] not in BLOCK_STACKS:
        return None
    frames, height, width = about["size"]
    return frames * (height // 2) * (width // 2) * config.num_attention_heads * config.attention_head_dim
