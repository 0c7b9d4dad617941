"""Open-Sora 1.2's transformer, STDiT3: blocks over space and blocks over time, one of each in turn.

Written from its description (the technical report and the published model's shapes), on diffusers' base classes, so that
caches, offload and compilation work on it as on diffusers' own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional

EPS = 1e-6
Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (frames, head_dim / 2) each


class STDiT3Transformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    """The velocity of a latent clip at a time, given the text. The defaults are the published STDiT3-XL/2.

    The published network gives 8 channels, of which the first 4 are the velocity towards the data, and the others, a variance
    that was not trained, are not used. Here the output is the velocity alone and points towards the noise, as everywhere in
    diffusers: `x + (sigma_next - sigma) v` is Euler's step.

    Args:
        num_layers: pairs of a spatial and a temporal block.
        out_channels: of the head; the velocity is in the first `in_channels` of them.
        text_dim, text_length: of the encoded prompt; the embedding of no prompt has this shape.
        freq_dim: of the sinusoids that stand for time and frames a second.
        base_size: side in pixels of the picture whose positions are not scaled.
    """

    _no_split_modules: ClassVar[list[str]] = ["STDiT3Pair"]
    _repeated_blocks: ClassVar[list[str]] = ["STDiT3Pair"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["rope"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["patch_embedding", "norm", "rope"]

    @register_to_config
    def __init__(
        self,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        mlp_ratio: float = 4.0,
        text_dim: int = 4096,
        text_length: int = 300,
        freq_dim: int = 256,
        base_size: int = 512,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        patch = (patch_size[0], patch_size[1], patch_size[2])  # a list where it was read from a file
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=patch, stride=patch)
        self.time_embedding = TimestepEmbedding(freq_dim, width)
        self.fps_embedding = TimestepEmbedding(freq_dim, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.text_embedding = TextEmbedding(text_dim, width, text_length)
        self.rope = TimeRotation(attention_head_dim)
        self.blocks = nn.ModuleList([STDiT3Pair(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)])
        self.head = Head(width, patch[0] * patch[1] * patch[2] * out_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        without_text: torch.Tensor | None = None,
        fps: torch.Tensor | None = None,
        height: torch.Tensor | None = None,
        width: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The velocity, (batch, in_channels, frames, height, width) in float32.

        Args:
            hidden_states: latents, (batch, in_channels, frames, height, width), of any size.
            timestep: in [0, 1000], (batch,); rounded to the dtype of the weights, as published.
            encoder_hidden_states: the encoded prompt, (batch, n, text_dim) with n up to `text_length`.
            encoder_attention_mask: (batch, n), true where there is text; None: everywhere.
            without_text: (batch,), true where the embedding of no prompt is to stand for the text; None: nowhere.
            fps: frames a second, (batch,).
            height, width: of the clip in pixels, (batch,); the first of each scales all positions.
        """
        frames, rows, columns = self._grid(hidden_states)
        tokens, time, modulation = self.embed(hidden_states, timestep, fps, height, width)
        text = self.text_embedding(encoder_hidden_states.to(tokens.dtype), without_text)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        rotation = self.rope(frames)
        for block in self.blocks:
            tokens = block(tokens, text, modulation, mask, frames, rotation)
        patches = self.head(tokens, time)

        p_t, p_h, p_w = self.config.patch_size
        patches = patches.unflatten(-1, (p_t, p_h, p_w, self.config.out_channels))[..., : self.config.in_channels]
        patches = patches.unflatten(1, (frames, rows, columns))  # b t h w p_t p_h p_w c
        towards_data = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(
            len(patches), self.config.in_channels, frames * p_t, rows * p_h, columns * p_w
        )
        t, h, w = hidden_states.shape[2:]
        velocity = -towards_data[:, :, :t, :h, :w].float()
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def embed(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        fps: torch.Tensor | None,
        height: torch.Tensor | None,
        width: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What block 0 is given: tokens (batch, tokens, width), time (batch, width), modulation (batch, 6, width)."""
        if fps is None or height is None or width is None:
            raise ValueError(
                "STDiT3Transformer3DModel needs fps, height and width of the clip: give one of each a sample"
            )
        dtype = self.patch_embedding.weight.dtype
        _, rows, columns = self._grid(hidden_states)
        padding = [
            short
            for size, patch in zip(hidden_states.shape[:1:-1], self.config.patch_size[::-1], strict=True)
            for short in (0, -size % patch)
        ]
        tokens = self.patch_embedding(functional.pad(hidden_states.to(dtype), padding)).flatten(3)  # b c t s
        scale = (height[0].float() * width[0].float()).sqrt() / self.config.base_size
        positions = plane_positions(rows, columns, tokens.shape[1], scale).to(dtype)
        tokens = (tokens.permute(0, 2, 3, 1) + positions).flatten(1, 2)
        time = self.time_embedding(self._sinusoids(timestep)) + self.fps_embedding(self._sinusoids(fps))
        return tokens, time, self.modulation(functional.silu(time)).unflatten(1, (6, -1))

    def _sinusoids(self, values: torch.Tensor) -> torch.Tensor:
        dtype = self.patch_embedding.weight.dtype
        rounded = values.to(dtype).float()
        sines = get_timestep_embedding(rounded, self.config.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return sines.to(dtype)

    def _grid(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """Patches of a latent along time, height and width; what sticks out gets one of its own."""
        t, h, w = (-(-size // patch) for size, patch in zip(latents.shape[2:], self.config.patch_size, strict=True))
        return t, h, w


class STDiT3Pair(nn.Module):
    """A block over space and one over time: all tokens of a frame see each other, then all frames of a place."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.spatial = STDiT3Block(width, heads, mlp_ratio)
        self.temporal = STDiT3Block(width, heads, mlp_ratio)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        mask: torch.Tensor | None,
        frames: int,
        rotation: Rotation,
    ) -> torch.Tensor:
        tokens = self.spatial(hidden_states, encoder_hidden_states, modulation, mask, frames, None)
        return self.temporal(tokens, encoder_hidden_states, modulation, mask, frames, rotation)


# diffusers' own caches ask what a block gives back
TransformerBlockRegistry.register(STDiT3Pair, TransformerBlockMetadata(return_hidden_states_index=0))


class STDiT3Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and last modulated by the time."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.mlp = FeedForward(width, int(width * mlp_ratio), width)
        self.modulate = Modulation(width)

    def modulated_input(self, tokens: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """What the self-attention is given."""
        shift, scale, *_ = self.modulate(modulation)
        return self.norm1(tokens) * (1 + scale) + shift

    def forward(
        self,
        tokens: torch.Tensor,
        text: torch.Tensor,
        modulation: torch.Tensor,
        mask: torch.Tensor | None,
        frames: int,
        rotation: Rotation | None,
    ) -> torch.Tensor:
        """With a rotation the block is one over time, without one over space.

        Args:
            tokens: (batch, frames x places, width), frame after frame.
            modulation: (batch, 6, width): shift, scale and gate of the self-attention, then of the feed-forward.
        """
        _, _, gate, shift, scale, mlp_gate = self.modulate(modulation)
        grouped = self.modulated_input(tokens, modulation).unflatten(1, (frames, -1))  # b t s c
        if rotation is None:
            seen = self.attn(grouped.flatten(0, 1)).unflatten(0, (-1, frames))
        else:
            places = grouped.shape[2]
            seen = self.attn(grouped.transpose(1, 2).flatten(0, 1), rotation).unflatten(0, (-1, places)).transpose(1, 2)
        tokens = tokens + gate * seen.flatten(1, 2)
        tokens = tokens + self.cross_attn(tokens, text, mask)
        return tokens + mlp_gate * self.mlp(self.norm2(tokens) * (1 + scale) + shift)


class Modulation(nn.Module):
    """Shift, scale and gate of the self-attention, then of the feed-forward, (batch, 1, width) each: the time's and its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, modulation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.table + modulation).chunk(6, dim=1)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Attention with queries and keys normed by head; over time they are rotated after that."""

    is_cross_attention = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // heads, eps=EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, rotation: Rotation | None = None) -> torch.Tensor:
        parts = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1))  # b n 3 h d
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(seen.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of all tokens to the text."""

    is_cross_attention = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query = self.query(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(encoder_hidden_states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with GELU (its tanh form) between."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(hidden_states), approximate="tanh"))


class TextEmbedding(FeedForward):
    """The encoded prompt in the transformer's width, or the learned embedding of no prompt, (text_length, text_dim)."""

    no_text: torch.Tensor

    def __init__(self, text_dim: int, width: int, text_length: int) -> None:
        super().__init__(text_dim, width, width)
        self.register_buffer("no_text", torch.randn(text_length, text_dim) / text_dim**0.5)

    def forward(self, hidden_states: torch.Tensor, without: torch.Tensor | None = None) -> torch.Tensor:
        if without is not None:
            nothing = self.no_text[: hidden_states.shape[1]].to(hidden_states.dtype)
            hidden_states = torch.where(without[:, None, None], nothing, hidden_states)
        return super().forward(hidden_states)


class TimeRotation(nn.Module):
    """The rotation of a frame's queries and keys, by its place in the clip."""

    freqs: torch.Tensor

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("freqs", base ** -(torch.arange(0, head_dim, 2).float() / head_dim))

    def forward(self, frames: int) -> Rotation:
        angles = torch.outer(torch.arange(frames, device=self.freqs.device).float(), self.freqs.float())
        return angles.cos(), angles.sin()


def rotate(vectors: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Each pair of neighbouring numbers of vectors (…, frames, head_dim) is turned by its frame's angle."""
    cosine, sine = rotation
    even, odd = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1)
    return turned.flatten(-2).to(vectors.dtype)


class Head(nn.Module):
    """From tokens to patches, modulated by the time."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.proj = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, hidden_states: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        return self.proj(self.norm(hidden_states) * (1 + scale) + shift)


def plane_positions(rows: int, columns: int, width: int, scale: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the place in a frame, (rows x columns, width): of the column first, then of the row.

    Places are counted on a square of as many patches, and divided by `scale`, so that a larger picture lies on the same square.
    """
    base = round((rows * columns) ** 0.5)
    quarter = width // 4
    speeds = 10000.0 ** -(torch.arange(quarter, device=scale.device).float() / quarter)

    def along(count: int) -> torch.Tensor:
        places = torch.arange(count, device=scale.device).float() / scale * (base / count)
        angles = torch.outer(places, speeds)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    x = along(columns)[None].expand(rows, -1, -1)
    y = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([x, y], dim=2).flatten(0, 1)
