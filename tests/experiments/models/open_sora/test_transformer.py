"""STDiT3 against a second, naive implementation, and what depends on dtype and arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erta.online import Call
from experiments.methods.teacache import modulated_input
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel
from tests.experiments.models.open_sora.naive import velocity_towards_data
from tests.pipelines import TINY_STDIT3

FPS, HEIGHT, WIDTH = 24.0, 480.0, 854.0


def tiny() -> STDiT3Transformer3DModel:
    torch.manual_seed(3)
    transformer = STDiT3Transformer3DModel(**TINY_STDIT3).eval()
    with torch.no_grad():  # norms that are all ones would hide which is whose
        for name, parameter in transformer.named_parameters():
            if "_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return transformer


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """A latent whose sides are odd, two texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 4)
    mask[-1, 3:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 3, 5, 7, generator=generator),
        "timestep": torch.tensor([700.3] * batch),
        "encoder_hidden_states": torch.randn(batch, 4, 24, generator=generator),
        "encoder_attention_mask": mask,
        **{
            name: torch.full((batch,), value)
            for name, value in zip(("fps", "height", "width"), (FPS, HEIGHT, WIDTH), strict=True)
        },
    }


@torch.no_grad()
def test_the_forward_is_that_of_a_naive_implementation():
    """To 1e-5, both of two samples: one with its text, one with a shorter mask and the embedding of no text.

    Mutants: rows and columns of the positions swapped, sines before cosines in the time, no rotation over time, rotation before
    the norm, attention over the wrong axis, the mask dropped, the last channels of the head, the sign of the velocity.
    """
    transformer, given = tiny(), inputs()
    made = transformer(**given, without_text=torch.tensor([False, True])).sample
    weights = {name: tensor.double().numpy() for name, tensor in transformer.state_dict().items()}
    texts = [given["encoder_hidden_states"][0].double().numpy(), weights["text_embedding.no_text"][:3]]
    for sample, text in enumerate(texts):
        x = given["hidden_states"][sample].double().numpy()
        naive = velocity_towards_data(weights, 2, x, float(given["timestep"][0]), text, FPS, HEIGHT, WIDTH)
        np.testing.assert_allclose(made[sample].numpy(), -naive, atol=1e-5)
        assert np.abs(naive).mean() > 0.1
    assert made.dtype == torch.float32 and made.shape == given["hidden_states"].shape


@torch.no_grad()
def test_the_time_is_rounded_to_the_dtype_of_the_weights():
    """In bfloat16, 995 and 996 are one time, as in the published model; 980 is another. Mutant: sinusoids of the exact time."""
    transformer, given = tiny().to(torch.bfloat16), inputs()
    made = {
        time: transformer(**{**given, "timestep": torch.tensor([time] * 2)}, return_dict=False)[0]
        for time in (995.0, 996.0, 980.0)
    }
    assert torch.equal(made[995.0], made[996.0]) and not torch.equal(made[996.0], made[980.0])
    assert made[980.0].dtype == torch.float32


@torch.no_grad()
def test_teacache_signal_is_what_the_first_attention_is_given():
    """Mutants: without the modulation, without the positions, that of another block."""
    transformer, given, seen = tiny(), inputs(), []
    attention = transformer.blocks[0].spatial.attn
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    transformer(**given)
    handle.remove()
    signal = modulated_input(Call(0, 1, "cond_uncond", given["hidden_states"], transformer, (), given))
    torch.testing.assert_close(signal, seen[0].unflatten(0, (2, 3)).flatten(1, 2))


def test_frame_rate_and_size_must_be_told():
    given = inputs()
    del given["fps"]
    with pytest.raises(ValueError, match="needs fps, height and width"):
        tiny()(**given)
