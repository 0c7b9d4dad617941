"""Training of the embedded image model: it is trained on what FluxPipeline will give it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from experiments.scenes import Object, Scene, caption, render, sample_scene
from experiments.scenes.captions import words_of
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training.clip import TEXT_POSITIONS, build_clip, clip_tokenizer
from experiments.training.image_transformer import (
    TEXT_LENGTH,
    Texts,
    Velocity,
    build_image_transformer,
    encode_pictures,
    guided,
    pack,
    picture_cells,
)
from experiments.training.image_vae import build_image_vae
from experiments.training.text import build_picture_text_encoder
from experiments.training.train_images import text_tower


@pytest.fixture(scope="module")
def texts() -> Texts:
    clip, tokenizer = build_clip(len(clip_tokenizer()), 0), build_tokenizer()
    return Texts(clip_tokenizer(), text_tower(clip), tokenizer, build_picture_text_encoder(len(tokenizer), 0).eval())


@pytest.fixture(scope="module")
def transformer():
    model = build_image_transformer(0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_transformer_is_trained_on_what_the_pipeline_gives_it(texts, transformer):
    """Mutants: another text length, words with a mask, timesteps up to 1000, another order of the image tokens."""
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), build_image_vae(0).eval(), texts.clip, texts.clip_tokenizer, texts.encoder,
        texts.tokenizer, transformer,
    )  # fmt: skip
    seen = []
    handle = transformer.register_forward_hook(lambda _, __, given, made: seen.append((given, made)), with_kwargs=True)
    latents = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    prompt = "a small red star on a dark background"
    pipe(prompt, height=64, width=64, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=TEXT_LENGTH,
         latents=latents, output_type="latent")  # fmt: skip
    handle.remove()
    given, (made,) = seen[0]
    sigma, guidance = given["timestep"], torch.tensor([3.5])
    with torch.no_grad():
        trained = Velocity(transformer)(latents, sigma, guidance, texts([prompt]))
    torch.testing.assert_close(trained, made, rtol=1e-4, atol=1e-5)
    assert 0.9 < float(sigma) <= 1


def test_guidance_is_extrapolated_from_no_text(texts, transformer):
    """Mutants: with and without swapped, a scale of 1 that is not the plain model."""
    torch.manual_seed(0)
    noisy, sigma = torch.randn(2, 64, 16), torch.tensor([0.7, 0.4])
    text, no_text, teacher = texts(["a red circle", "a blue star"]), texts([""]), Velocity(transformer)
    with torch.no_grad():
        plain = teacher(noisy, sigma, torch.ones(2), text)
        without = teacher(noisy, sigma, torch.ones(2), texts(["", ""]))
        found = guided(teacher, noisy, sigma, torch.tensor([1.0, 3.0]), text, no_text)
    torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], without[1] + 3 * (plain[1] - without[1]), rtol=1e-4, atol=1e-5)
    assert (plain - without).abs().max() > 1e-3


def test_cells_of_a_picture_lie_where_its_tokens_do():
    """Mutant: cells packed in another order than the latents."""
    scene = Scene((Object("square", "red", "small"),), "striped", None)
    frames = render(scene, np.random.default_rng(0))
    cells = picture_cells(torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1)
    red = (frames[0].max(-1) - frames[0].min(-1) > 0.15).reshape(16, 4, 16, 4).any(axis=(1, 3))
    np.testing.assert_array_equal(cells[0, 0].numpy(), red)
    tokens = pack(cells.float())[0].reshape(8, 8, 2, 2)
    np.testing.assert_array_equal(tokens.permute(0, 2, 1, 3).reshape(16, 16).numpy(), red)
    assert 0.02 < red.mean() < 0.2


def test_latents_are_those_that_the_pipeline_decodes(tmp_path, monkeypatch):
    """Mutants: the shift forgotten, the scale the wrong way round. encode → pack, then as FluxPipeline decodes."""
    monkeypatch.setattr("experiments.training.flow.ENCODED_AT_ONCE", 2)
    vae = build_image_vae(0).eval()
    vae.register_to_config(shift_factor=0.3, scaling_factor=2.0)
    tokens, objects, scenes = encode_pictures(vae, tmp_path / "latents.safetensors", 4, seed=0)
    assert tokens.shape == objects.shape == (4, 64, 16) and len(scenes) == 4 and objects.any() and not objects.all()
    latents = FluxPipeline._unpack_latents(tokens, 64, 64, vae_scale_factor=4)
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    rng = np.random.default_rng([0, 7, 1])
    picture = torch.from_numpy(render(sample_scene(rng, "train", picture=True), rng)).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        wanted = vae.encode(picture).latent_dist.mode()
    torch.testing.assert_close(raw[1:2], wanted, rtol=2e-3, atol=2e-3)  # kept in half precision


def test_captions_of_pictures_fit_the_text_lengths():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, num_objects=2, picture=True) for _ in range(4000)]
    longest = max(len(words_of(caption(scene, rng))) for scene in scenes)
    assert longest + 1 <= TEXT_LENGTH <= TEXT_POSITIONS
    words = " ".join(caption(scene, rng) for scene in scenes)
    assert not {"moving", "still", "rising", "drifting"} & set(words_of(words))
