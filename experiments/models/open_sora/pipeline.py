"""Open-Sora 1.2's text-to-video as a diffusers pipeline: T5, STDiT3, rectified flow, the two-stage autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.utils import BaseOutput, is_bs4_available, is_ftfy_available
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from erta.errors import ErtaError
from experiments.models.open_sora import checkpoint
from experiments.models.open_sora.autoencoder import AutoencoderKLOpenSora
from experiments.models.open_sora.sizes import SPACE_FACTOR, latent_frames, time_shift
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel

BATCHED = "cond_uncond"  # diffusers' name for both guidance branches in one batch


@dataclass
class OpenSoraOutput(BaseOutput):
    """`frames`: clips as `output_type` says; `np`: (batch, frames, height, width, 3) in [0, 1]."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):
    """See the module. Both guidance branches run in one batch, the unconditional one first, as in all of diffusers.

    (The published sampler puts it second; nothing in a batch depends on the order. Caches know diffusers' order.)
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        transformer: STDiT3Transformer3DModel,
        vae: AutoencoderKLOpenSora,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )
        self.video_processor = VideoProcessor(vae_scale_factor=SPACE_FACTOR)
        self._guidance_scale, self._num_timesteps = 1.0, 0
        self._current_timestep: torch.Tensor | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> OpenSoraPipeline:
        """A pipeline folder (`convert` makes one), or the published checkpoints from the hub.

        Raises ErtaError for checkpoints of another layout, OSError for what is neither here nor on the hub.
        """
        if Path(source).is_dir():
            return super().from_pretrained(source, **options)
        return cls(
            **checkpoint.from_hub(str(source), options.get("torch_dtype") or torch.float32, options.get("revision"))
        )

    @staticmethod
    def where_weights_are() -> str:
        """For messages: what to download, and what to do with it."""
        return checkpoint.how_to_get()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    def encode_prompt(self, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's last states, (batch, n, text_dim), and where there is text, (batch, n); n is that of the longest prompt."""
        tokens = self.tokenizer(
            prompts, max_length=max_sequence_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self._execution_device), tokens.attention_mask.to(self._execution_device)
        states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        longest = int(mask.sum(dim=1).max())
        return states[:, :longest], mask[:, :longest].bool()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int = 480,
        width: int = 854,
        num_frames: int = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        fps: float = 24.0,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = 300,
    ) -> OpenSoraOutput | tuple[Any]:
        """Clips of one or more prompts.

        Args:
            height, width: in pixels; the clip has the next smaller multiples of 8.
            num_frames: a multiple of 17.
            fps: frames a second that the clip is to be seen at.
            aesthetic_score, motion_score, camera_motion: what is written behind the prompt; None: nothing.
            latents: the noise; drawn by `generator` if not given.
            output_type: latent, np, pt or pil.
            max_sequence_length: of the prompt, in tokens, up to the transformer's `text_length`.

        Raises ErtaError for sizes, lengths and latents that the model cannot have.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        shape = (len(prompts), *self._latent_shape(height, width, num_frames))
        if latents is not None and latents.shape != shape:
            raise ErtaError(f"the latents have the shape {tuple(latents.shape)}; this call needs {shape}")
        if max_sequence_length > self.transformer.config.text_length:
            raise ErtaError(
                f"max_sequence_length={max_sequence_length}: the transformer knows texts of "
                f"{self.transformer.config.text_length} tokens at most"
            )
        self._guidance_scale, device = guidance_scale, self._execution_device
        guided = self.do_classifier_free_guidance
        suffix = scores(aesthetic_score, motion_score, camera_motion)
        text, mask = self.encode_prompt([clean(one + suffix) for one in prompts], max_sequence_length)
        both = 2 if guided else 1
        conditions = {
            "encoder_hidden_states": text.repeat(
                both, 1, 1
            ),  # the first half stands for no text: its values are not read
            "encoder_attention_mask": None if bool(mask.all()) else mask.repeat(both, 1),
            "without_text": torch.arange(both * len(prompts), device=device) < len(prompts) if guided else None,
            **{
                name: torch.full((both * len(prompts),), float(value), device=device)
                for name, value in (("fps", fps), ("height", height), ("width", width))
            },
        }
        self._set_timesteps(num_inference_steps, math.log(time_shift(height, width, num_frames)), device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)

        with self.progress_bar(total=self._num_timesteps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                self._current_timestep = timestep
                told = {
                    "step_index": step,
                    "sigma": float(self.scheduler.sigmas[step]),
                    "num_inference_steps": self._num_timesteps,
                }
                with self.transformer.cache_context(BATCHED, **told):
                    velocity = self.transformer(
                        hidden_states=latents.repeat(both, 1, 1, 1, 1),
                        timestep=timestep.expand(both * len(prompts)),
                        return_dict=False,
                        **conditions,
                    )[0]
                if guided:
                    without, given = velocity.chunk(2)
                    velocity = without + guidance_scale * (given - without)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    values = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = callback_on_step_end(self, step, timestep, values).pop("latents", latents)
                bar.update()
        self._current_timestep = None

        if output_type == "latent":
            frames: Any = latents
        else:
            clips = self.vae.decode(latents.to(self.vae.dtype), num_frames, return_dict=False)[0]
            frames = self.video_processor.postprocess_video(clips, output_type=output_type)
        self.maybe_free_model_hooks()
        return OpenSoraOutput(frames=frames) if return_dict else (frames,)

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        rows, columns = height // SPACE_FACTOR, width // SPACE_FACTOR
        if min(rows, columns) < 1:
            raise ErtaError(f"{height}x{width} is smaller than a latent: take at least {SPACE_FACTOR} pixels a side")
        return self.transformer.config.in_channels, latent_frames(num_frames), rows, columns

    def _set_timesteps(self, steps: int, mu: float, device: torch.device) -> None:
        """Times 1 - i / N, shifted by exp(mu); solvers that make flow sigmas of their own shift them themselves."""
        if self.scheduler.config.get("use_flow_sigmas"):
            self.scheduler.set_timesteps(steps, device=device, mu=mu)
        else:
            even = 1 - np.arange(steps) / steps
            self.scheduler.set_timesteps(sigmas=even.tolist(), device=device, mu=mu)
        self._num_timesteps = len(self.scheduler.timesteps)


def scores(aesthetic: float | None, motion: float | None, camera: str | None) -> str:
    """What is written behind a prompt, as published: it tells the model what quality and motion to draw."""
    said = [] if aesthetic is None else [f" aesthetic score: {aesthetic:.1f}."]
    said += [] if motion is None else [f" motion score: {motion:.1f}."]
    return "".join(said + ([] if camera is None else [f" camera motion: {camera}."]))


def clean(prompt: str) -> str:
    """The prompt as the captions of the training were cleaned: diffusers' own cleaning (it is PixArt's too), twice.

    Raises ErtaError if one of the two packages that this needs is missing.
    """
    if not (is_ftfy_available() and is_bs4_available()):
        raise ErtaError("Open-Sora 1.2 cleans prompts with ftfy and beautifulsoup4: pip install ftfy beautifulsoup4")
    for _ in range(2):
        prompt = PixArtSigmaPipeline._clean_caption(PixArtSigmaPipeline, prompt)  # reads nothing but the class
    return prompt
