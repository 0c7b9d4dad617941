"""All that the project knows of a transformer class, one entry each: add an entry here, and every room knows the class.

What is not named in an entry is unknown, and what needs it says so before anything is computed. `site=output` works without
one on every class whose output is of the form of its input, with the channels on axis 1 or, of packed tokens, last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from erta.errors import InstallError

Signal = Callable[[Any, dict[str, Any]], torch.Tensor]
Inputs = Callable[["CallSizes", Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class BlockStack:
    """Where a transformer keeps its blocks: attribute names in order, and which output holds the image tokens.

    Attributes:
        output_index: None if a block returns the image tokens alone, else their place in the pair that it returns, whose
            other member are the text tokens.
        text: a block's argument that holds the text tokens, by name and, where it is given by place, by place.
        controls: arguments of the transformer that add to single blocks, which an exchanged stack would lose.
    """

    lists: tuple[str, ...]
    output_index: int | None = None
    text: tuple[str, int] = ("encoder_hidden_states", 1)
    controls: tuple[str, ...] = ()

    def of(self, transformer: nn.Module) -> list[nn.Module]:
        """All blocks in the order in which they run."""
        return [block for name in self.lists for block in transformer.get_submodule(name)]  # type: ignore[union-attr]

    def is_inside(self, module: str) -> bool:
        """Whether a module of this name lies in one of the blocks."""
        return module.startswith(tuple(f"{name}." for name in self.lists))

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """A block's token streams among its arguments, in the order of its output."""
        tokens = latent_of(args, kwargs)
        if self.output_index is None:
            return [tokens]
        name, place = self.text
        text = kwargs[name] if name in kwargs else args[place]
        return [text, tokens] if self.output_index == 1 else [tokens, text]


@dataclass(frozen=True)
class CallSizes:
    """Sizes of one call: latent frames, height and width, latent channels; `text` is positions and width."""

    frames: int
    height: int
    width: int
    channels: int
    text: tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """What is known of a transformer class.

    Attributes:
        channel_axis: of an unpacked latent; packed tokens (b, n, c) have theirs last, whatever is said here.
        blocks: its stack of blocks; None: not known, so there is no `site=blocks`.
        components: kinds of cacheable modules, each with a pattern of module names: `attention`, `cross`, `mlp`, …;
            `temporal` is self-attention over the frames where that over space is another module.
        self_attention: the pattern of modules that are self-attention and nothing else.
        unread: by kind, modules that a module of that kind alone reads: where it is reused they need not run.
        signal: TeaCache's: the input of block 0 after its modulation by the timestep, or the time embedding.
        inputs: what its pipeline calls it with beside latent, timestep and text.
        is_packed: its pipeline packs 2x2 latents into one token.
        is_told_the_step: its pipeline's `cache_context` carries step and sigma, which diffusers' SeaCache asks for.
        beside_velocity: where its output holds more than the velocity, which a reused step repeats from the last computed
            one: `channels`, as many again (a learned variance, which pipelines drop), or `output`, a second one (sound).
        references_before: the argument that says how many tokens of references lie before the latent's, and are not answered.
        published: models with published sizes in `experiments/models/architectures.yaml`.
    """

    name: str
    channel_axis: int = 1
    blocks: BlockStack | None = None
    components: Mapping[str, str] = field(default_factory=dict)
    self_attention: str | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    signal: Signal | None = None
    inputs: Inputs | None = None
    is_packed: bool = False
    is_told_the_step: bool = False
    beside_velocity: str | None = None
    references_before: str | None = None
    published: tuple[str, ...] = ()

    def channel_axis_of(self, latent: torch.Tensor) -> int:
        """The channel axis of a latent."""
        return latent.ndim - 1 if latent.ndim == 3 else self.channel_axis

    def call_inputs(self, sizes: CallSizes, config: Any) -> dict[str, torch.Tensor]:
        """Arguments of one forward of batch 1, as the class's pipeline gives them, of no particular values."""
        given = {
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, *sizes.text),
        }
        if self.inputs is not None:
            given |= self.inputs(sizes, config)
        if self.is_packed:
            tokens = sizes.height // 2 * (sizes.width // 2)
            return {"hidden_states": torch.empty(1, tokens, 4 * sizes.channels), **given}
        shape = [sizes.frames, sizes.height, sizes.width]
        shape.insert(self.channel_axis - 1, sizes.channels)
        return {"hidden_states": torch.empty(1, *shape), **given}


def architecture_of(transformer: nn.Module) -> Architecture:
    """The entry of a transformer's class; one that knows nothing but the name if there is none."""
    name = model_name(transformer)
    return ARCHITECTURES.get(name, Architecture(name))


def knowing(part: str) -> str:
    """The classes whose entry has `part`, for messages."""
    return ", ".join(name for name, entry in ARCHITECTURES.items() if getattr(entry, part))


def blocks_of(transformer: nn.Module, who: str, instead: str = "") -> BlockStack:
    """The transformer's stack of blocks.

    Raises InstallError where it is not known, which says `who` needs it and what to do `instead`.
    """
    stack = architecture_of(transformer).blocks
    if stack is None:
        raise InstallError(
            f"{who} does not know the blocks of {model_name(transformer)} (it knows {knowing('blocks')}): {instead}"
            "add an entry to erta/architectures.py"
        )
    return stack


def model_name(transformer: nn.Module) -> str:
    """Class name of a transformer."""
    return type(transformer).__name__


def latent_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The latent (or the tokens) that a module was called with; a list of them, one a sample, as one tensor.

    Raises InstallError for a list of latents that are not of one shape.
    """
    latent = raw_latent(args, kwargs)
    if not isinstance(latent, list):
        return latent
    if len({getattr(one, "shape", None) for one in latent}) > 1 or not isinstance(latent[0], torch.Tensor):
        raise InstallError("this call gives its transformer latents of several shapes: that cannot be cached")
    return torch.stack(latent)


HOOK_NAME = "erta_cache"  # of ours, in diffusers' registry of a transformer's hooks


@contextmanager
def at_rest(transformer: nn.Module) -> Iterator[None]:
    """Inside the `with`, no forward of another thread has the transformer's blocks exchanged (`site=blocks`)."""
    registry = getattr(transformer, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(HOOK_NAME)
    with nullcontext() if hook is None else hook.lock:
        yield


def raw_latent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The latent in the form in which a module was given it."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return args[0] if args else kwargs["x"]


def _wan_signal(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The time embedding `e`, (batch, width): the same for every prompt and branch."""
    embedder = transformer.condition_embedder
    frequencies = embedder.timesteps_proj(kwargs["timestep"].flatten())
    return embedder.time_embedder(frequencies.to(next(embedder.time_embedder.parameters()).dtype))


def _flux_signal(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens after block 0's first norm, modulated by time, guidance and pooled text: (batch, tokens, width)."""
    tokens = transformer.x_embedder(kwargs["hidden_states"])
    conditions = [kwargs["timestep"].to(tokens.dtype) * 1000]
    if kwargs.get("guidance") is not None:
        conditions.append(kwargs["guidance"].to(tokens.dtype) * 1000)
    embedding = transformer.time_text_embed(*conditions, kwargs["pooled_projections"])
    return transformer.transformer_blocks[0].norm1(tokens, emb=embedding)[0]


def _cogvideox_signal(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The time embedding, (batch, width)."""
    frequencies = transformer.time_proj(kwargs["timestep"])
    return transformer.time_embedding(frequencies.to(kwargs["hidden_states"].dtype), kwargs.get("timestep_cond"))


def _hunyuan_video_signal(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens after block 0's first norm, modulated by time, guidance and pooled text: (batch, tokens, width)."""
    embedding = transformer.time_text_embed(kwargs["timestep"], kwargs["pooled_projections"], kwargs.get("guidance"))[0]
    return transformer.transformer_blocks[0].norm1(transformer.x_embedder(kwargs["hidden_states"]), emb=embedding)[0]


def _stdit3_signal(transformer: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tokens that the first spatial attention is given, modulated by time and frame rate: (batch, tokens, width)."""
    given = (kwargs[name] for name in ("hidden_states", "timestep", "fps", "height", "width"))
    tokens, _, modulation = transformer.embed(*given)
    return transformer.blocks[0].spatial.modulated_input(tokens, modulation)


def _flux_inputs(sizes: CallSizes, config: Any) -> dict[str, torch.Tensor]:
    tokens = sizes.height // 2 * (sizes.width // 2)
    return {
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(sizes.text[0], 3),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        "guidance": torch.empty(1),
    }


def _hunyuan_video_inputs(sizes: CallSizes, config: Any) -> dict[str, torch.Tensor]:
    return {
        "encoder_attention_mask": torch.ones(1, sizes.text[0]),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        "guidance": torch.empty(1),
    }


def _stdit3_inputs(sizes: CallSizes, config: Any) -> dict[str, torch.Tensor]:
    return {"fps": torch.empty(1), "height": torch.empty(1), "width": torch.empty(1)}


ENTRIES = (
    Architecture(
        "WanTransformer3DModel",
        blocks=BlockStack(("blocks",)),
        components={
            "attention": r"blocks\.\d+\.attn1",
            "cross": r"blocks\.\d+\.attn2",
            "mlp": r"blocks\.\d+\.ffn",
        },
        self_attention=r"^blocks\.\d+\.attn1$",
        signal=_wan_signal,
        is_told_the_step=True,
        published=("wan21", "wan21_14b", "wan22_a14b"),
    ),
    Architecture(
        "FluxTransformer2DModel",
        blocks=BlockStack(
            ("transformer_blocks", "single_transformer_blocks"),
            output_index=1,
            controls=("controlnet_block_samples", "controlnet_single_block_samples"),
        ),
        components={
            "attention": r"transformer_blocks\.\d+\.attn",
            "mlp": r"transformer_blocks\.\d+\.(ff|ff_context)",
            "parallel": r"single_transformer_blocks\.\d+\.proj_out",  # one projection of attention and feed-forward
        },
        self_attention=r"transformer_blocks\.\d+\.attn$",
        unread={"parallel": r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"},
        signal=_flux_signal,
        inputs=_flux_inputs,
        is_packed=True,
        published=("flux_dev",),
    ),
    Architecture(
        "CogVideoXTransformer3DModel",
        channel_axis=2,  # (b, frames, channels, height, width)
        signal=_cogvideox_signal,
        published=("cogvideox_2b",),
    ),
    Architecture(
        "HunyuanVideoTransformer3DModel",
        signal=_hunyuan_video_signal,
        inputs=_hunyuan_video_inputs,
        published=("hunyuan_video",),
    ),
    Architecture(
        "STDiT3Transformer3DModel",  # Open-Sora 1.2, of experiments/models/open_sora
        blocks=BlockStack(("blocks",)),  # pairs of a spatial and a temporal block
        components={
            "attention": r"blocks\.\d+\.spatial\.attn",
            "temporal": r"blocks\.\d+\.temporal\.attn",
            "cross": r"blocks\.\d+\.(spatial|temporal)\.cross_attn",
            "mlp": r"blocks\.\d+\.(spatial|temporal)\.mlp",
        },
        self_attention=r"^blocks\.\d+\.(spatial|temporal)\.attn$",
        signal=_stdit3_signal,
        inputs=_stdit3_inputs,
        is_told_the_step=True,
        published=("open_sora_12",),
    ),
    Architecture("Flux2Transformer2DModel", references_before="num_ref_tokens"),  # at the first step, by Klein KV
    Architecture("PixArtTransformer2DModel", beside_velocity="channels"),
    Architecture("LatteTransformer3DModel", beside_velocity="channels"),
    Architecture("HunyuanDiT2DModel", beside_velocity="channels"),
    Architecture("LuminaNextDiT2DModel", beside_velocity="channels"),
    Architecture("SanaTransformer2DModel", beside_velocity="channels"),
    Architecture("LTX2VideoTransformer3DModel", beside_velocity="output"),
    Architecture("Kandinsky5Transformer3DModel", channel_axis=4),  # (b, frames, height, width, channels)
    Architecture("ConsisIDTransformer3DModel", channel_axis=2),  # (b, frames, channels, height, width)
)
ARCHITECTURES = {entry.name: entry for entry in ENTRIES}
