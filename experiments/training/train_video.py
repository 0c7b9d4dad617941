"""The embedded video model, part by part: autoencoder, its decoder alone, text encoder, transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from experiments.training.loop import StageSettings, training_device, with_end
from experiments.training.text import train_text_encoder
from experiments.training.video_transformer import BATCH_SIZE, train_transformer
from experiments.training.video_vae import train_decoder, train_vae

PARTS = ("autoencoder", "decoder", "text", "transformer")
# Steps and batch for two cores. The shipped transformer was made on a GPU, in two goes: train_tiny.batch_size=256 with
# train_tiny.steps=16300, then on from there with train_tiny.steps=36200.
SETTINGS = {
    "autoencoder": StageSettings("autoencoder", steps=1700, learning_rate=7e-3, decay_share=0.6, ema_decay=0.998),
    "decoder": StageSettings("decoder", steps=1800, learning_rate=4e-3, ema_decay=0.998),
    "text": StageSettings("text", steps=1200, learning_rate=3e-3, decay_share=0.5, ema_decay=0.99),
    "transformer": StageSettings("transformer", steps=17_500, learning_rate=3e-3, decay_share=0.3, ema_decay=0.999),
}


def train(cfg: DictConfig, work: Path, until: str, on_sample: Callable[[Any, int], None]) -> WanPipeline | None:
    """Train what is not trained yet, up to the part `until`; the pipeline if that is the last."""
    device, world = training_device(cfg.train_tiny.device), cfg.model.world
    if not (work / "autoencoder" / "vae").is_dir():
        train_vae(SETTINGS["autoencoder"], work / "autoencoder", world, device)
    encoding_vae = AutoencoderKLWan.from_pretrained(work / "autoencoder" / "vae")
    if until == "autoencoder":
        return None
    if not (work / "decoder" / "vae").is_dir():
        first = AutoencoderKLWan.from_pretrained(work / "autoencoder" / "vae")
        train_decoder(SETTINGS["decoder"], work / "decoder", first, world, device)
    vae = AutoencoderKLWan.from_pretrained(work / "decoder" / "vae")
    if until == "decoder":
        return None
    if not (work / "text" / "text_encoder").is_dir():
        train_text_encoder(SETTINGS["text"], work / "text", world=world, device=device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "text" / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(work / "text" / "text_encoder")
    if until == "text":
        return None

    def assemble(transformer: WanTransformer3DModel) -> WanPipeline:
        """The parts as a pipeline with the solver of the paper's harness."""
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=cfg.model.flow_shift
        )
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder.eval(),
            vae=vae.eval(),
            scheduler=scheduler,
            transformer=transformer,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(transformer.device)

    transformer = train_transformer(
        with_end(SETTINGS["transformer"], cfg.train_tiny.steps, cfg.train_tiny.minutes),
        work / "transformer",
        encoding_vae,
        tokenizer,
        text_encoder,
        lambda transformer, step: on_sample(assemble(transformer), step),
        cfg.train_tiny.batch_size or BATCH_SIZE,
        device,
        world,
    )
    return assemble(transformer)
