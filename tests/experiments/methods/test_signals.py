"""TeaCache's signal of each class that has one, against what the model itself computes."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, HunyuanVideoTransformer3DModel

from erta.online import Call, online
from experiments.methods.teacache import modulated_input
from tests.erta.test_online import Scripted
from tests.pipelines import FLUX_CALL, WAN_CALL, build_cogvideox, build_flux, build_pipe, generate


@pytest.mark.parametrize("build", [build_pipe, build_flux])
def test_teacache_signal_is_what_the_first_block_is_given(build):
    """Against what the model itself computes. Mutants: no factor of 1000, the raw tokens, another step's time."""
    pipe, inside, signals = build(), [], []
    transformer = pipe.transformer
    if build is build_pipe:
        module, picked = transformer.condition_embedder, lambda output: output[0]
    else:
        module, picked = transformer.transformer_blocks[0].norm1, lambda output: output[0]
    handle = module.register_forward_hook(lambda module, args, output: inside.append(picked(output)))

    class Look(Scripted):
        def computed(self, call, velocity, residual):
            count = len(inside)
            signals.append(modulated_input(call))
            del inside[count:]

    with online(pipe, Look(*range(8))):
        generate(pipe, WAN_CALL if build is build_pipe else FLUX_CALL)
    handle.remove()
    assert len(signals) == len(inside) >= 6
    for found, expected in zip(signals, inside, strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(signals[0], signals[-1])


def hunyuan_video():
    """A tiny random transformer of HunyuanVideo's, what it is called with, and where its signal arises."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    kwargs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }
    return transformer, kwargs, transformer.transformer_blocks[0].norm1, lambda made: made[0]


def cogvideox():
    """The same of CogVideoX's."""
    transformer = build_cogvideox(CogVideoXDDIMScheduler()).transformer
    kwargs = {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "timestep": torch.tensor([700, 700]),
        "encoder_hidden_states": torch.randn(2, 16, 24),
    }
    return transformer, kwargs, transformer.time_embedding, lambda made: made


@pytest.mark.parametrize("build", [hunyuan_video, cogvideox])
def test_teacache_signals_of_the_other_published_models(build):
    """Against what the transformer itself computes. Mutants: no guidance, another block's norm, raw frequencies."""
    transformer, kwargs, module, picked = build()
    inside: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, args, made: inside.append(picked(made)))
    rotary = transformer.config.get("use_rotary_positional_embeddings")
    with torch.no_grad():
        if rotary:  # what follows the embedding needs more than is looked at here
            with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError)):
                transformer.eval()(**kwargs, image_rotary_emb=(None, None))
        else:
            transformer.eval()(**kwargs)
    handle.remove()
    call = Call(0, 1, "cond", kwargs["hidden_states"], transformer, (), kwargs)
    torch.testing.assert_close(modulated_input(call), inside[0])
