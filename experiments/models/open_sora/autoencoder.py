"""Open-Sora 1.2's video autoencoder: an image autoencoder for every frame, and one over time on its latents.

Written from the published model's shapes and description: the image part is diffusers' AutoencoderKL, the part over time a
causal convolutional network that sees 17 frames at a time and keeps 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional

from experiments.models.open_sora.sizes import MICRO_FRAMES

IMAGE_SCALE = 0.18215  # of the image autoencoder's latents, as Open-Sora uses them
PUBLISHED_STDS, PUBLISHED_MEANS = (3.85, 2.32, 2.33, 3.06), (-0.10, 0.34, 0.27, 0.98)


class AutoencoderKLOpenSora(ModelMixin, ConfigMixin):
    """Clips in [-1, 1] and their latents, of which every channel has about mean 0 and deviation 1. Defaults: as published.

    Args:
        image_channels: by level of the image autoencoder.
        time_channels: of the first level of the network over time; `time_multipliers` says how many times that the others have.
        time_downsample: after which of its levels (but the last) the frames are halved.
        groups: of the group norms of both.
        micro_frames: frames that the network over time sees at once.
        frame_batch: frames that the image autoencoder is given at once.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        image_channels: tuple[int, ...] = (128, 256, 512, 512),
        image_layers: int = 2,
        time_channels: int = 128,
        time_multipliers: tuple[int, ...] = (1, 2, 2, 4),
        time_downsample: tuple[bool, ...] = (False, True, True),
        time_layers: int = 4,
        groups: int = 32,
        micro_frames: int = MICRO_FRAMES,
        frame_batch: int = 4,
    ) -> None:
        super().__init__()
        self.spatial = AutoencoderKL(
            block_out_channels=tuple(image_channels),
            down_block_types=("DownEncoderBlock2D",) * len(image_channels),
            up_block_types=("UpDecoderBlock2D",) * len(image_channels),
            layers_per_block=image_layers,
            latent_channels=latent_channels,
            norm_num_groups=groups,
            scaling_factor=IMAGE_SCALE,
        )
        levels = [time_channels * factor for factor in time_multipliers]
        self.encoder = TimeEncoder(latent_channels, levels, time_downsample, time_layers, groups)
        self.quant_conv = CausalConv(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = CausalConv(latent_channels, latent_channels, 1)
        self.decoder = TimeDecoder(latent_channels, levels, time_downsample, time_layers, groups)
        self.time_factor = 2 ** sum(time_downsample)
        for name, values in (("scale", PUBLISHED_STDS), ("shift", PUBLISHED_MEANS)):
            self.register_buffer(name, torch.tensor(values[:latent_channels]).reshape(1, -1, 1, 1, 1))

    def enable_tiling(self) -> None:
        """Frames are encoded and decoded in tiles."""
        self.spatial.enable_tiling()

    @apply_forward_hook
    def encode(self, clips: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents (batch, channels, latent frames, h / 8, w / 8) of clips (batch, 3, frames, h, w), drawn by `generator`."""

        def encode_frame(frames: torch.Tensor) -> torch.Tensor:
            return self.spatial.encode(frames).latent_dist.sample(generator) * IMAGE_SCALE

        drawn = []
        for part in self._by_frame(clips, encode_frame).split(self.config.micro_frames, dim=2):
            padded = functional.pad(part, (0, 0, 0, 0, -part.shape[2] % self.time_factor, 0))
            drawn.append(DiagonalGaussianDistribution(self.quant_conv(self.encoder(padded))).sample(generator))
        return (torch.cat(drawn, dim=2) - self.shift) / self.scale

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, num_frames: int, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Clips (batch, 3, num_frames, 8 h, 8 w) of latents (batch, channels, latent frames, h, w)."""
        plain = latents * self.scale + self.shift
        made, left = [], num_frames
        for part in plain.split(-(-self.config.micro_frames // self.time_factor), dim=2):
            frames = self.decoder(self.post_quant_conv(part))
            made.append(frames[:, :, -min(self.config.micro_frames, left) :])  # what stands before was padding
            left -= self.config.micro_frames
        clips = self._by_frame(torch.cat(made, dim=2), lambda frames: self.spatial.decode(frames / IMAGE_SCALE).sample)
        return DecoderOutput(sample=clips) if return_dict else (clips,)

    def _by_frame(self, clips: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1)
        made = torch.cat([make(part) for part in frames.split(self.config.frame_batch)])
        return made.unflatten(0, (len(clips), -1)).transpose(1, 2)


class CausalConv(nn.Module):
    """A convolution whose outputs know no later frames: all padding of the time lies before the first one."""

    def __init__(self, channels: int, out: int, size: int, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.padding = (size // 2,) * 4 + (size - time_stride, 0)
        self.conv = nn.Conv3d(channels, out, size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(hidden_states, self.padding))


class ResBlock(nn.Module):
    """Two convolutions, each after a norm; another one on the way around them where the channels change."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = CausalConv(channels, out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, out)
        self.conv2 = CausalConv(out, out, 3, bias=False)
        self.conv3 = CausalConv(channels, out, 1, bias=False) if channels != out else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made = self.conv1(functional.silu(self.norm1(hidden_states)))
        made = self.conv2(functional.silu(self.norm2(made)))
        return made + (hidden_states if self.conv3 is None else self.conv3(hidden_states))


def res_blocks(channels: int, out: int, count: int, groups: int) -> nn.Sequential:
    """`count` residual blocks, of which the first changes the channels."""
    return nn.Sequential(*(ResBlock(channels if index == 0 else out, out, groups) for index in range(count)))


class TimeEncoder(nn.Module):
    """Mean and logarithmic variance of the latents, from image latents with all their frames."""

    def __init__(
        self, latent_channels: int, levels: list[int], downsample: tuple[bool, ...], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv(latent_channels, levels[0], 3, bias=False)
        before = [levels[0], *levels[:-1]]
        self.levels = nn.ModuleList(
            res_blocks(channels, out, layers, groups) for channels, out in zip(before, levels, strict=True)
        )
        self.halving = nn.ModuleDict(
            {
                str(level): CausalConv(levels[level], levels[level], 3, time_stride=2)
                for level, halves in enumerate(downsample)
                if halves
            }
        )
        self.middle = res_blocks(levels[-1], levels[-1], layers, groups)
        self.norm = nn.GroupNorm(groups, levels[-1])
        self.conv_out = CausalConv(levels[-1], 2 * latent_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made = self.conv_in(hidden_states)
        for level, blocks in enumerate(self.levels):
            made = blocks(made)
            if str(level) in self.halving:
                made = self.halving[str(level)](made)
        return self.conv_out(functional.silu(self.norm(self.middle(made))))


class TimeDecoder(nn.Module):
    """Image latents with all their frames, the padded ones among them, from latents. Levels are those of the encoder."""

    def __init__(
        self, latent_channels: int, levels: list[int], downsample: tuple[bool, ...], layers: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv(latent_channels, levels[-1], 3)
        self.middle = res_blocks(levels[-1], levels[-1], layers, groups)
        after = [*levels[1:], levels[-1]]
        self.levels = nn.ModuleList(
            res_blocks(channels, out, layers, groups) for channels, out in zip(after, levels, strict=True)
        )
        self.doubling = nn.ModuleDict(
            {
                str(level): CausalConv(levels[level + 1], 2 * levels[level + 1], 3)
                for level, halves in enumerate(downsample)
                if halves
            }
        )
        self.norm = nn.GroupNorm(groups, levels[0])
        self.conv_out = CausalConv(levels[0], latent_channels, 3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        made = self.middle(self.conv_in(hidden_states))
        for level in reversed(range(len(self.levels))):
            made = self.levels[level](made)
            if str(level - 1) in self.doubling:
                doubled = self.doubling[str(level - 1)](made).unflatten(1, (-1, 2))  # b c 2 t h w
                made = doubled.transpose(2, 3).flatten(2, 3)
        return self.conv_out(functional.silu(self.norm(made)))
