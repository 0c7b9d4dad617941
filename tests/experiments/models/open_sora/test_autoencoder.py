"""The two-stage autoencoder: micro-batches of 17 frames, the padding that is cut off, causality, scale and shift."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from experiments.models.open_sora.autoencoder import PUBLISHED_MEANS, PUBLISHED_STDS, AutoencoderKLOpenSora, CausalConv
from tests.pipelines import TINY_VAE


def tiny() -> AutoencoderKLOpenSora:
    torch.manual_seed(0)
    return AutoencoderKLOpenSora(**TINY_VAE).eval()


@torch.no_grad()
def test_there_and_back():
    """34 frames are 10 latent ones and 34 again; each seventeen is decoded alone. Mutant: one pass over all frames."""
    vae = tiny()
    latents = vae.encode(torch.rand(2, 3, 34, 16, 24) * 2 - 1, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 10, 2, 3)
    clips = vae.decode(latents, 34).sample
    assert clips.shape == (2, 3, 34, 16, 24)
    torch.testing.assert_close(vae.decode(latents[:, :, 5:], 17).sample, clips[:, :, 17:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_cut_off_stands_before():
    """5 latent frames make 20, of which the last 17 count; then the image part is given them by four.

    Mutants: the first 17 kept; the latents neither scaled nor shifted; image latents not divided by their scale.
    """
    vae, seen = tiny(), []

    class Numbered(nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents)
            frames = torch.arange(20.0).reshape(1, 1, -1, 1, 1)
            return frames.expand(len(latents), 3, -1, *latents.shape[3:])

    vae.decoder, vae.post_quant_conv, batches = Numbered(), nn.Identity(), []

    def decode(frames: torch.Tensor) -> SimpleNamespace:
        batches.append(len(frames))
        return SimpleNamespace(sample=frames)

    vae.spatial.decode = decode
    clips = vae.decode(torch.ones(1, 4, 10, 2, 2), 34).sample
    expected = torch.tensor([*range(3, 20), *range(3, 20)]) / 0.18215
    torch.testing.assert_close(clips[0, 0, :, 0, 0], expected)
    assert batches == [4] * 8 + [2] and len(seen) == 2
    wanted = torch.tensor(PUBLISHED_STDS) + torch.tensor(PUBLISHED_MEANS)
    torch.testing.assert_close(seen[0][0, :, 0, 0, 0], wanted)


@torch.no_grad()
def test_convolutions_over_time_know_no_later_frame():
    """Mutant: padding on both sides of the time."""
    conv, clip = CausalConv(2, 3, 3), torch.randn(1, 2, 6, 4, 4)
    other = clip.clone()
    other[:, :, 4:] += 1
    made, changed = conv(clip), conv(other)
    assert made.shape == (1, 3, 6, 4, 4) and torch.equal(made[:, :, :4], changed[:, :, :4])
    assert not torch.equal(made[:, :, 4:], changed[:, :, 4:])
    assert CausalConv(2, 3, 3, time_stride=2)(clip).shape == (1, 3, 3, 4, 4)


@torch.no_grad()
def test_doubled_frames_alternate():
    """Of a convolution to twice the channels, even ones make the first of two frames. Mutant: halves one after the other."""
    vae = tiny()
    decoder, seen = vae.decoder, []
    double = decoder.doubling["2"]
    double.register_forward_hook(lambda module, args, output: seen.append(output))
    decoder.levels[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoder(torch.randn(1, 4, 5, 2, 2))
    raw, frames = seen
    assert frames.shape[:3] == (1, raw.shape[1] // 2, 10)
    assert torch.equal(frames[:, :, 0::2], raw[:, 0::2]) and torch.equal(frames[:, :, 1::2], raw[:, 1::2])
