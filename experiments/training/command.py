"""`python run.py experiment=train_tiny`: autoencoder, its decoder alone, text encoder, transformer, pipeline folder.

Every part goes on from its last checkpoint in `experiment.work_dir`; a finished part is not trained again.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from erta.errors import ErtaError
from experiments import console
from experiments.calibrating import make_calibration
from experiments.models import ASSETS, call_kwargs, load_pipeline
from experiments.prompts import Prompt, test_prompts
from experiments.record import mark_finished, read_json, write_json
from experiments.scenes import agreement, read_clip
from experiments.training.loop import StageSettings
from experiments.training.text import train_text_encoder
from experiments.training.transformer import train_transformer
from experiments.training.vae import train_decoder, train_vae
from experiments.vbench_runner import to_uint8

PARTS = ("autoencoder", "decoder", "text", "transformer")
# The shipped transformer had 7,912 steps on scenes at free positions with an unweighted loss, decayed, and the rest of
# its 14,400 as below. One run from the start with these settings has not been made.
SETTINGS = {
    "autoencoder": StageSettings("autoencoder", steps=1700, learning_rate=7e-3, decay_share=0.6, ema_decay=0.998),
    "decoder": StageSettings("decoder", steps=1800, learning_rate=4e-3, ema_decay=0.998),
    "text": StageSettings("text", steps=1200, learning_rate=3e-3, decay_share=0.5, ema_decay=0.99),
    "transformer": StageSettings("transformer", steps=20_500, learning_rate=3e-3, decay_share=0.28, ema_decay=0.999),
}
SHEET_PROMPTS = 12


def run(cfg: DictConfig, folder: Path) -> None:
    """Train what is not trained yet, and install the pipeline under erta/assets with its calibration."""
    if not cfg.model.embedded or cfg.model.pipeline != "WanPipeline":
        raise ErtaError(f"experiment=train_tiny trains embedded models, and model={cfg.model.name} is not one")
    until = cfg.experiment.until or PARTS[-1]
    if until not in PARTS:
        raise ErtaError(f"experiment.until must be one of {', '.join(PARTS)}, not {until!r}")
    work = Path(cfg.experiment.work_dir or Path.home() / ".cache" / "erta" / "train" / cfg.model.name).expanduser()
    console.note(f"checkpoints, curves and sample sheets: {work}")
    vae_folder, decoder_folder = work / "vae", work / "decoder"
    text_folder, transformer_folder = work / "text", work / "transformer"
    if not (vae_folder / "vae").is_dir():
        train_vae(SETTINGS["autoencoder"], vae_folder)
    encoding_vae = AutoencoderKLWan.from_pretrained(vae_folder / "vae")
    if until == "autoencoder":
        return
    if not (decoder_folder / "vae").is_dir():
        train_decoder(SETTINGS["decoder"], decoder_folder, AutoencoderKLWan.from_pretrained(vae_folder / "vae"))
    vae = AutoencoderKLWan.from_pretrained(decoder_folder / "vae")
    if until == "decoder":
        return
    if not (text_folder / "text_encoder").is_dir():
        train_text_encoder(SETTINGS["text"], text_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_folder / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(text_folder / "text_encoder")
    if until == "text":
        return
    prompts = test_prompts(cfg)[:SHEET_PROMPTS]

    def sheet(transformer: WanTransformer3DModel, step: int) -> None:
        pipe = assemble(cfg, vae, tokenizer, text_encoder, transformer)
        right = draw_sheet(
            pipe, prompts, {**call_kwargs(cfg), "num_inference_steps": 25}, work / f"sheet_{step:06d}.png"
        )
        console.note(f"step {step}: {right} of {len(prompts)} clips show all that was asked for")

    transformer = train_transformer(
        SETTINGS["transformer"], transformer_folder, encoding_vae, tokenizer, text_encoder, sheet
    )
    if not cfg.experiment.install:
        return
    curves = {
        part: work / name / "curve.jsonl"
        for part, name in zip(PARTS, ("vae", "decoder", "text", "transformer"), strict=True)
    }
    install(cfg, assemble(cfg, vae, tokenizer, text_encoder, transformer), curves)
    mark_finished(folder)


def assemble(
    cfg: DictConfig,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
) -> WanPipeline:
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
    return pipe


def install(cfg: DictConfig, pipe: WanPipeline, curves: dict[str, Path]) -> None:
    """Write the pipeline folder into the package, with the training curves and the default run's calibration."""
    target = ASSETS / cfg.model.name
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    for path in partial.glob("*/config.json"):  # diffusers notes where the parts were loaded from
        kept = {key: value for key, value in read_json(path).items() if key != "_name_or_path"}
        write_json(path, kept)
    (partial / "training").mkdir()
    for part, curve in curves.items():
        shutil.copyfile(curve, partial / "training" / f"{part}.jsonl")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    steps = cfg.model.num_inference_steps
    make_calibration(cfg, load_pipeline(cfg), target / f"calibration-{steps}.safetensors")
    console.note(f"installed: {target}")


def draw_sheet(pipe: Any, prompts: list[Prompt], kwargs: dict[str, Any], path: Path) -> int:
    """First, middle and last frame of every prompt as one picture; returns how many show all that was asked for."""
    from PIL import Image

    strips, right = [], 0
    for prompt in prompts:
        generator = torch.Generator().manual_seed(prompt.seed)
        frames = np.asarray(pipe(prompt=prompt.text, generator=generator, output_type="np", **kwargs).frames[0])
        strips.append(np.concatenate(frames[[0, len(frames) // 2, -1]], axis=1))
        right += prompt.scene is not None and agreement(prompt.scene, read_clip(frames))["all"]
    half = (len(strips) + 1) // 2
    strips += [np.ones_like(strips[0])] * (2 * half - len(strips))
    picture = np.concatenate([np.concatenate(strips[:half]), np.concatenate(strips[half:])], axis=1)
    image = Image.fromarray(to_uint8(picture))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)
    return right
