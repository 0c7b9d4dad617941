"""experiment=model_card: counted without weights."""

from __future__ import annotations

import numpy as np
import pytest

import erta
from erta.errors import ErtaError
from experiments.model_card import model_card, shown
from tests.commands import config
from tests.pipelines import CALL, PROMPTS


@pytest.mark.parametrize(
    ("model", "billions", "latent", "blocks_mb"),
    [
        ("wan21", 1.42, [16, 21, 60, 104], 2 * 21 * 30 * 52 * 1536 * 2 / 1e6),
        ("wan21_14b", 14.3, [16, 21, 90, 160], 2 * 21 * 45 * 80 * 5120 * 2 / 1e6),
        ("wan22_a14b", 28.6, [16, 21, 60, 104], 2 * 21 * 30 * 52 * 5120 * 2 / 1e6),
        ("flux_dev", 11.9, [4096, 64], 4096 * 3072 * 2 / 1e6),
        ("cogvideox_2b", 1.69, [13, 16, 60, 90], None),
        ("open_sora_12", 1.2076, [4, 15, 60, 106], 2 * 15 * 30 * 53 * 1152 * 2 / 1e6),
        pytest.param("hunyuan_video", 12.8, [16, 33, 68, 120], None, marks=pytest.mark.slow),
    ],
)
def test_cards_of_the_real_models(model, billions, latent, blocks_mb):
    """Sizes from the architecture alone. Mutant: one guidance branch, or float32, in the cache bytes."""
    card = model_card(config(f"model={model}"))
    assert card.parameters / 1e9 == pytest.approx(billions, rel=0.01) and card.latent_shape == latent
    velocity_bytes = 4 if model == "open_sora_12" else 2  # its latents and outputs are float32
    assert card.cache_bytes["output"] == card.forwards_per_step * np.prod(latent) * velocity_bytes
    assert blocks_mb is None or card.cache_bytes["blocks"] / 1e6 == pytest.approx(blocks_mb)
    tokens = np.prod(latent) / 64  # of 2x2 latents with 16 channels; a matrix takes two FLOPs an entry and token
    assert card.flops_per_forward > tokens * card.parameters / card.transformers
    assert 1 < card.calibration_generations["output"] < 1.01


def test_true_guidance_takes_a_second_forward():
    """Mutant: forwards counted by the embedded scale."""
    one = model_card(config("model=flux_dev"))
    two = model_card(config("model=flux_dev", "model.guidance_scale=1", "model.true_cfg_scale=4"))
    assert (one.forwards_per_step, two.forwards_per_step) == (1, 2)
    assert (
        two.flops_per_sample == 2 * one.flops_per_sample and two.cache_bytes["output"] == 2 * one.cache_bytes["output"]
    )


def test_flops_of_open_sora_by_hand():
    """Fourteen widths squared a token and block (8 of them the feed-forward), attention over a frame or over all frames.

    Mutant: attention over all tokens, which would take seven times as much.
    """
    frames, places, width, text = 15, 30 * 53, 1152, 300
    tokens = frames * places
    linear = 2 * tokens * (6 + 8) * width**2 + 2 * text * 2 * width**2
    attention = 4 * tokens * (places + text) * width, 4 * tokens * (frames + text) * width
    card = model_card(config("model=open_sora_12"))
    assert card.flops_per_forward == pytest.approx(28 * (2 * linear + sum(attention)), rel=0.01)
    assert dict(shown(card))["parameters"] == "1.208 billion"
    with pytest.raises(ErtaError, match="a multiple of 17 frames, and 50 is none: take 51"):
        model_card(config("model=open_sora_12", "model.num_frames=50"))


@pytest.mark.slow
def test_card_of_two_transformers():
    """A step runs one of them and the cache holds residuals of one. Mutants: both in a forward, one in the parameters."""
    both = model_card(config("model=wan22_a14b"))
    one = model_card(config("model=wan21_14b", "model.height=480", "model.width=832"))
    assert both.parameters == 2 * one.parameters and one.transformers == 1
    for key in ("flops_per_step", "cache_bytes"):
        assert getattr(both, key) == getattr(one, key), key
    assert dict(shown(both))["parameters"].startswith("28.577 billion in 2 of 14.288")
    assert dict(shown(one))["parameters"] == "14.288 billion"


def test_flops_by_hand():
    """Wan 1.3B: twelve widths squared a token and block, and attention over all tokens. Mutant: attention not counted."""
    tokens, width, ffn, blocks, text = 21 * 30 * 52, 1536, 8960, 30, 512
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * text * 2 * width**2
    attention = 4 * tokens * (tokens + text) * width
    card = model_card(config("model=wan21"))
    assert card.flops_per_forward == pytest.approx(blocks * (linear + attention), rel=0.01)
    assert card.calibration_generations["blocks"] == pytest.approx(1 + 16 * card.reused_step_share["blocks"])
    assert model_card(config("model=wan21", "model.guidance_scale=1")).forwards_per_step == 1


def test_card_counts_what_a_run_keeps(pipe, tmp_path):
    """The counted cache bytes are those that a trace measures. Mutant: tokens of single latents."""
    pipe.save_pretrained(tmp_path)
    size = [f"model.{key}={CALL[key]}" for key in ("height", "width", "num_frames", "num_inference_steps")]
    card = model_card(config(f"model.path={tmp_path}", *size))
    for site in ("output", "blocks"):
        plan = erta.calibrate(pipe, PROMPTS[:1], site=site, window=4, **CALL).plan(steps=4)
        with erta.cached(pipe, plan) as trace:
            pipe(prompt=PROMPTS[0], output_type="latent", **CALL)
        assert card.cache_bytes[site] == trace.cache_bytes
    assert 0.01 < card.reused_step_share["blocks"] < 0.9


def test_a_card_of_an_unknown_architecture(tmp_path):
    with pytest.raises(ErtaError, match=r"wan21_14b"):
        model_card(config("model=wan21", "model.name=mine"))
