"""The embedded image model, part by part: autoencoder, CLIP, text encoder, transformer with distilled guidance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from omegaconf import DictConfig
from transformers import CLIPModel, CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from experiments.training.clip import clip_tokenizer, train_clip
from experiments.training.image_transformer import BATCH_SIZE, TEXT_LENGTH, Texts, train_image_transformer
from experiments.training.image_vae import train_image_vae
from experiments.training.loop import StageSettings, training_device, with_end
from experiments.training.text import train_text_encoder

PARTS = ("autoencoder", "clip", "text", "transformer")
# Steps and batch for two cores. The shipped transformer was made on a GPU with train_tiny.batch_size=256 and
# train_tiny.steps=20300 (of the first stage).
SETTINGS = {
    "autoencoder": StageSettings("autoencoder", steps=900, learning_rate=7e-3, decay_share=0.6, ema_decay=0.998),
    "clip": StageSettings("clip", steps=1000, learning_rate=2e-3, decay_share=0.5, ema_decay=0.99),
    "text": StageSettings("text", steps=1200, learning_rate=3e-3, decay_share=0.5, ema_decay=0.99),
    "first": StageSettings("transformer", steps=2000, learning_rate=3e-3, decay_share=0.3, ema_decay=0.998),
    "distilled": StageSettings("distillation", steps=600, learning_rate=1e-3, ema_decay=0.99),
}
SHIFT = 1.15  # what FLUX.1-dev's scheduler arrives at for 1024x1024 pixels


def train(cfg: DictConfig, work: Path, until: str, on_sample: Callable[[Any, int], None]) -> FluxPipeline | None:
    """Train what is not trained yet, up to the part `until`; the pipeline if that is the last."""
    device, world = training_device(cfg.train_tiny.device), cfg.model.world
    if not (work / "autoencoder" / "vae").is_dir():
        train_image_vae(SETTINGS["autoencoder"], work / "autoencoder", world, device)
    vae = AutoencoderKL.from_pretrained(work / "autoencoder" / "vae")
    if until == "autoencoder":
        return None
    if not (work / "clip" / "clip").is_dir():
        train_clip(SETTINGS["clip"], work / "clip", world, device)
    if until == "clip":
        return None
    if not (work / "text" / "text_encoder").is_dir():
        train_text_encoder(SETTINGS["text"], work / "text", TEXT_LENGTH, True, world, device)
    texts = Texts(
        clip_tokenizer(world),
        text_tower(CLIPModel.from_pretrained(work / "clip" / "clip")),
        PreTrainedTokenizerFast.from_pretrained(work / "text" / "tokenizer"),
        T5EncoderModel.from_pretrained(work / "text" / "text_encoder").eval(),
    )
    if until == "text":
        return None

    def assemble(transformer: FluxTransformer2DModel) -> FluxPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=SHIFT, max_shift=SHIFT)
        pipe = FluxPipeline(
            scheduler=scheduler,
            vae=vae.eval(),
            text_encoder=texts.clip,
            tokenizer=texts.clip_tokenizer,
            text_encoder_2=texts.encoder,
            tokenizer_2=texts.tokenizer,
            transformer=transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(transformer.device)

    transformer = train_image_transformer(
        with_end(SETTINGS["first"], cfg.train_tiny.steps, cfg.train_tiny.minutes),
        SETTINGS["distilled"],
        work / "transformer",
        vae,
        texts,
        lambda transformer, step: on_sample(assemble(transformer), step),
        cfg.train_tiny.batch_size or BATCH_SIZE,
        device,
        world,
    )
    return assemble(transformer)


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text half of a CLIPModel as the model class that FluxPipeline takes."""
    tower = CLIPTextModel(clip.config.text_config)
    wanted = tower.state_dict()
    state = {key: value for key, value in clip.state_dict().items()}
    tower.load_state_dict({key: state[key if key in state else f"text_model.{key}"] for key in wanted})
    return tower.eval()
