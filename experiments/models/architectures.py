"""What a model is made of and what its transformer is called with, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from erta.architectures import ARCHITECTURES, Architecture, CallSizes
from erta.errors import ErtaError
from experiments.models.load import ASSETS
from experiments.models.open_sora.sizes import latent_frames
from experiments.output import console
from experiments.output.files import read_json

PUBLISHED = Path(__file__).with_name("architectures.yaml")


def describe(cfg: DictConfig) -> dict[str, Any]:
    """Class, configuration and input sizes of a model: an embedded one's from its folder, else as published."""
    model = cfg.model
    known: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(PUBLISHED))  # type: ignore[assignment]
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
            "forwards": 1 if image else 2,
        }
    if about is not None and not model.embedded and model.path is not None:
        console.note(f"the card is that of the published {model.name}; model.path is not read")
    if about is None:
        published = [model for entry in ARCHITECTURES.values() for model in entry.published]
        raise ErtaError(f"no architecture of model={model.name} is known; {PUBLISHED.name} has {', '.join(published)}")
    latent = about["latent"]
    space, num_frames = latent["space"], model.num_frames or 1
    frames = latent_frames(num_frames) if "micro_frames" in latent else (num_frames - 1) // latent["time"] + 1
    size = (frames, model.height // space, model.width // space)
    return {**about, "size": size}


def known_class(about: dict[str, Any]) -> Architecture:
    """What is known of the class of a model that `describe` describes."""
    return ARCHITECTURES.get(about["class"], Architecture(about["class"]))


def forward_inputs(about: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Arguments of one forward of batch 1, as the model's pipeline gives them."""
    frames, height, width = about["size"]
    sizes = CallSizes(frames, height, width, about["latent"]["channels"], tuple(about["text"]))
    return known_class(about).call_inputs(sizes, config)
