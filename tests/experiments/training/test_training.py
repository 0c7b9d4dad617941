"""Training: resuming gives the run that was never stopped, and the two tricks are exact."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from erta.errors import ErtaError
from experiments import train_tiny
from experiments.scenes import Object, Scene, caption, render, sample_scene
from experiments.scenes.captions import words_of
from experiments.scenes.tokenizer import build_tokenizer
from experiments.training import clip, image_transformer, image_vae, loop, video_vae
from experiments.training.flow import OBJECT_WEIGHT, flow_loss, hard_first, noised
from experiments.training.loop import StageSettings, Trainer
from experiments.training.muon import Muon, orthogonalise
from experiments.training.text import (
    MAX_WORDS,
    TEXT_DIM,
    as_seen,
    build_text_encoder,
    encode_words,
    train_text_encoder,
)
from experiments.training.video_transformer import (
    TEXT_LENGTH,
    PadCountAttention,
    attend_to_words,
    build_transformer,
    encode_clips,
    object_cells,
)
from experiments.training.video_vae import build_vae, set_latent_statistics
from tests import commands


def trainer(folder) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    settings = StageSettings("toy", steps=30, learning_rate=0.01, warmup_steps=3, decay_share=0.5, ema_decay=0.9)

    def loss_fn(step, rng):
        x = torch.from_numpy(rng.normal(size=(8, 4))).float()
        return (model(x) - x.sum(1, keepdim=True) + 0.1 * torch.randn(8, 1)).square().mean(), {}

    optimizers = [
        Muon([model[0].weight], lr=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p is not model[0].weight], lr=0.01),
    ]
    return Trainer(settings, model, loss_fn, optimizers, folder), model


def drawing(folder, draws_in: list[int]) -> tuple[Trainer, nn.Module]:
    """A trainer whose batches are drawn beforehand, by a function that notes the process."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings = StageSettings("toy", steps=12, learning_rate=0.01, warmup_steps=3)

    def draw(step, rng):
        return torch.from_numpy(rng.normal(size=(8, 4))).float(), step, os.getpid()

    def loss_fn(step, drawn):
        x, drawn_for, process = drawn
        assert step == drawn_for
        draws_in.append(process)
        return (model(x) - x.sum(1, keepdim=True) + 0.1 * torch.randn(8, 1)).square().mean(), {}

    return Trainer(settings, model, loss_fn, [torch.optim.SGD(model.parameters(), lr=0.01)], folder, draw=draw), model


def test_batches_drawn_ahead_are_the_same_batches(tmp_path, monkeypatch):
    """Mutants: batches in the order in which they come, a generator for each process, resuming at the first batch."""
    here, others = [], []
    first, one = drawing(tmp_path / "here", here)
    first.run()
    monkeypatch.setattr(loop, "drawing_processes", lambda device: 2)
    stopped, _ = drawing(tmp_path / "others", others)
    stopped.run(until_step=5)
    second, two = drawing(tmp_path / "others", others)
    second.run()
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=0)
    assert set(here) == {os.getpid()} and os.getpid() not in others and len(others) == 12


def test_nothing_is_drawn_ahead_on_the_cores_that_train():
    assert loop.drawing_processes("cpu") == 0 and 1 <= loop.drawing_processes("cuda") <= loop.MOST_DRAWING


def test_training_to_a_given_time(tmp_path, monkeypatch):
    """Mutants: the time of one start only, a learning rate that falls by steps and is cut off."""
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    settings = StageSettings("toy", steps=10_000, learning_rate=1.0, warmup_steps=1, decay_share=0.5, minutes=1.0)
    assert settings.learning_rate_factor(10, 29.0) == 1
    assert settings.learning_rate_factor(10, 45.0) == pytest.approx(0.5)
    assert settings.learning_rate_factor(7500, 0.0) == pytest.approx(0.5)
    model, rates = nn.Linear(1, 1), []

    def again() -> Trainer:
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3)]

        def loss_fn(step, rng):
            rates.append(optimizers[0].param_groups[0]["lr"] / 1e-3)
            return model.weight.square().sum(), {}

        return Trainer(settings, model, loss_fn, optimizers, tmp_path)

    first, second = again(), again()
    first.run(until_step=8)
    assert first.seconds == 24
    second.run()
    assert second.seconds == 60 and second.step == 20
    assert rates[:10] == [1.0] * 10 and rates[15] == pytest.approx(0.5) and rates[19] < 0.03


def test_minutes_alone_end_a_training():
    """Mutants: the usual number of steps ends it before, or sets the learning rate."""
    usual = StageSettings("toy", steps=2000, learning_rate=1.0, warmup_steps=1)
    assert loop.with_end(usual, None, 8.0).share_done(100_000, 240.0) == pytest.approx(0.5)
    assert loop.with_end(usual, 1000, 8.0).share_done(750, 240.0) == pytest.approx(0.75)
    assert loop.with_end(usual, None, None) == usual


@pytest.mark.parametrize("world", ["plain", "rich"])
def test_every_part_is_trained_on_the_asked_world(world, tmp_path, monkeypatch):
    """Mutants: a part that draws its batches of the plain world, and one that measures its latents on it."""
    seen: set[str] = set()

    def noting(*args, **kwargs):
        scene = sample_scene(*args, **kwargs)
        seen.add(scene.world)
        return scene

    def one_step(name: str) -> StageSettings:
        return StageSettings(name, steps=1, learning_rate=1e-3)

    whole = video_vae.set_latent_statistics
    monkeypatch.setattr(video_vae, "set_latent_statistics", lambda vae, rng, world: whole(vae, rng, 8, world))
    monkeypatch.setattr(video_vae, "BATCH_SIZE", 1)
    monkeypatch.setattr(image_vae, "BATCH_SIZE", 1)
    monkeypatch.setattr(clip, "PAIRS", 2)
    for name in ("video_vae", "image_vae", "clip", "text", "flow"):
        monkeypatch.setattr(f"experiments.training.{name}.sample_scene", noting)
        found = {
            "video_vae": lambda: video_vae.train_vae(one_step("vae"), tmp_path / "video", world),
            "image_vae": lambda: image_vae.train_image_vae(one_step("vae"), tmp_path / "image", world),
            "clip": lambda: clip.train_clip(one_step("clip"), tmp_path / "clip", world),
            "text": lambda: train_text_encoder(one_step("text"), tmp_path / "text", world=world),
            "flow": lambda: encode_clips(build_vae(0), tmp_path / "latents.safetensors", 2, seed=0, world=world),
        }[name]
        seen.clear()
        found()
        assert seen == {world}, name
    seen.clear()
    video_vae.train_decoder(one_step("decoder"), tmp_path / "decoder", build_vae(0), world)
    assert seen == {world}
    seen.clear()
    vae = image_vae.build_image_vae(0)
    image_transformer.encode_pictures(vae, tmp_path / "pictures.safetensors", 2, seed=0, world=world)
    assert seen == {world}
    patch = build_transformer(0, world).config.patch_size
    assert list(patch) == ([1, 1, 1] if world == "rich" else [1, 2, 2])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "text" / "tokenizer")
    assert ("thing" in tokenizer.get_vocab()) is (world == "rich")


def test_resuming_equals_not_stopping(tmp_path):
    whole, model = trainer(tmp_path / "whole")
    whole.run()
    first, _ = trainer(tmp_path / "parts")
    first.run(until_step=13)
    second, resumed = trainer(tmp_path / "parts")
    second.run()
    assert second.step == 30
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (tmp_path / "parts" / "curve.jsonl").read_text().count("\n") >= 1


def test_a_loss_that_is_not_finite_stops(tmp_path):
    toy, _ = trainer(tmp_path)
    toy.loss_fn = lambda step, rng: (torch.tensor(float("nan"), requires_grad=True), {})
    with pytest.raises(FloatingPointError, match="step 0"):
        toy.run()


def test_one_counted_pad_equals_all_pads():
    """Mutants: a wrong count, the bias on self-attention. Exact in theory, 1e-5 in float32."""
    tokenizer, transformer = build_tokenizer(), build_transformer(0).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("to_out.0.weight", "proj_out.weight")):
                parameter.normal_(std=0.2)
    encoder = build_text_encoder(len(tokenizer), 0).eval()
    captions = ["a small red circle moving left on a dark background", ""]
    x, sigma = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        full, _ = encode_words(tokenizer, encoder, captions, TEXT_LENGTH)
        short, _ = encode_words(tokenizer, encoder, captions, MAX_WORDS + 1)
        wanted = transformer(x, sigma, full, return_dict=False)[0]
        transformer.set_attn_processor(PadCountAttention(TEXT_LENGTH - MAX_WORDS))
        counted = transformer(x, sigma, short, return_dict=False)[0]
        transformer.set_attn_processor(PadCountAttention(1))
        uncounted = transformer(x, sigma, short, return_dict=False)[0]
        transformer.set_attn_processor(WanAttnProcessor())
    torch.testing.assert_close(counted, wanted, rtol=1e-4, atol=1e-5)
    assert (uncounted - wanted).abs().max() > 1e-3


def test_cross_attention_starts_on_the_words():
    """Mutant: a query bias against the keys' direction, or none: 479 pads take nearly all the weight."""
    tokenizer, transformer = build_tokenizer(), build_transformer(0)
    encoder, rng = build_text_encoder(len(tokenizer), 0), np.random.default_rng(0)
    captions = [caption(sample_scene(rng), rng) for _ in range(20)]
    with torch.no_grad():
        text, mask = encode_words(tokenizer, encoder, captions, TEXT_LENGTH)

        def weight_on_words() -> float:
            attention = transformer.blocks[3].attn2
            key = attention.norm_k(attention.to_k(transformer.condition_embedder.text_embedder(text)))
            query = attention.norm_q(attention.to_q(torch.randn(20, 12, 128)))
            query, key = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
            weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
            return (weights * mask[:, None, None]).sum(-1).mean().item()

        before = weight_on_words()
        attend_to_words(transformer, text[mask.bool()])
        assert before < 0.1 and weight_on_words() > 0.6


def test_text_is_taught_the_picture_not_the_wording():
    """Mutant: `as_seen` that swaps the objects and keeps the relation."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng, num_objects=2)
        assert as_seen(scene) == as_seen(scene.mirrored()) and as_seen(scene).relation in ("left of", "above")
        assert as_seen(scene) in (scene, scene.mirrored())
    assert as_seen(one := sample_scene(rng, num_objects=1)) == one


def test_latents_are_encoded_once_and_on_one_scale(tmp_path, monkeypatch):
    """Mutants: encoding starts anew, other scenes after resuming, a deviation for each channel."""
    monkeypatch.setattr("experiments.training.flow.ENCODED_AT_ONCE", 2)
    vae, calls = build_vae(0).eval(), []
    set_latent_statistics(vae, np.random.default_rng(0), count=8)
    assert len(set(vae.config.latents_std)) == 1 and vae.config.latents_std[0] > 0
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda clips: calls.append(len(clips)) or encode(clips))
    encode_clips(vae, tmp_path / "latents.safetensors", 2, seed=0)
    resumed, objects, scenes = encode_clips(vae, tmp_path / "latents.safetensors", 4, seed=0)
    assert calls == [2, 2] and len(scenes) == 4
    whole, same_objects, same_scenes = encode_clips(vae, tmp_path / "whole.safetensors", 4, seed=0)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert torch.equal(objects, same_objects) and objects.shape == (4, 1, 3, 8, 8)
    assert scenes == same_scenes and resumed.shape == (4, 16, 3, 8, 8)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    raw = load_file(tmp_path / "whole.safetensors")["latents"].float()
    torch.testing.assert_close(whole * vae.config.latents_std[0] + mean, raw, rtol=1e-4, atol=1e-5)


def test_cells_with_objects_are_found():
    """Mutant: the frames pooled in fours from the first one on."""
    scene = Scene((Object("square", "red", "small"),), "striped", "right")
    frames = render(scene, np.random.default_rng(0))
    (cells,) = object_cells(torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1)
    red = (frames.max(-1) - frames.min(-1) > 0.15).reshape(9, 8, 8, 8, 8).any(axis=(2, 4))
    wanted = np.stack([red[0], red[1:5].any(0), red[5:].any(0)])
    np.testing.assert_array_equal(cells[0].numpy(), wanted)
    assert 0.02 < wanted.mean() < 0.2 and (wanted[0] != wanted[2]).any()


def test_objects_count_more_where_they_can_be_seen():
    """Mutants: the weight at every noise level, not normalised, or on the background."""
    objects = torch.zeros(1, 1, 3, 8, 8, dtype=torch.bool)
    objects[..., :2] = True  # a quarter of the cells
    wanted = torch.randn(1, 16, 3, 8, 8)

    def loss_of(error_at: torch.Tensor, sigma: float) -> tuple[float, float]:
        loss, per_sample = flow_loss(wanted + error_at, wanted, objects, torch.tensor([sigma]))
        return loss.item(), per_sample.item()

    here, elsewhere = objects.float(), (~objects).float()
    share = (1 + OBJECT_WEIGHT) / (1 + OBJECT_WEIGHT / 4)
    assert loss_of(here, 0.5) == pytest.approx((share / 4, 0.25))
    assert loss_of(elsewhere, 0.5) == pytest.approx((1 - share / 4, 0.75))
    assert loss_of(here, 0.9) == pytest.approx((0.25, 0.25))


def test_velocity_leads_from_the_latents_to_the_noise():
    """Mutants: the velocity's sign, the levels swapped."""
    latents, sigma = torch.randn(2, 4, 3), torch.tensor([0.0, 0.75])
    noisy, velocity = noised(latents, sigma)
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1] - 0.75 * velocity[1], latents[1])
    assert (noisy[1] - latents[1]).std() > 0.3


def test_hard_shapes_are_drawn_more_often():
    """Mutant: small circles counted as hard."""

    def one(shape: str, size: str) -> Scene:
        return Scene((Object(shape, "red", size),), "dark", "still")

    pool = hard_first([one("circle", "small"), one("star", "large"), one("square", "small"), one("square", "large")])
    assert pool.tolist() == [0, 1, 1, 2, 2, 3]


def test_captions_fit_the_training_length():
    rng = np.random.default_rng(0)
    longest = max(len(words_of(caption(sample_scene(rng, num_objects=2), rng))) for _ in range(4000))
    assert longest + 1 <= MAX_WORDS


def test_muon_makes_orthogonal_updates():
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(24, 80, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.6 and singular.max() < 1.3
    kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
    before = kernel.detach().clone()
    kernel.grad = torch.randn_like(kernel)
    Muon([kernel], lr=0.1).step()
    change = (kernel.detach() - before).square().mean().sqrt()
    assert change == pytest.approx(0.1 * 0.2, rel=0.35)  # the RMS of an AdamW step of that learning rate


def test_tokenizer_drops_punctuation_and_case():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("A  Red circle, moving LEFT.") == ["a", "red", "circle", "moving", "left"]
    ids = tokenizer("red zebra").input_ids
    assert ids[1] == tokenizer.unk_token_id and ids[-1] == tokenizer.eos_token_id
    assert build_text_encoder(len(tokenizer), 0).config.d_model == TEXT_DIM


def test_checkpoints_go_on_under_their_own_code(tmp_path, monkeypatch):
    """Mutants: checkpoints of two versions of the world mixed; `resume=false` that throws hours of training away."""
    work = tmp_path / "work"
    for _ in range(2):
        train_tiny.check_source(commands.config("experiment=train_tiny"), work)
    (work / "checkpoint.safetensors").write_bytes(b"x")
    monkeypatch.setattr(train_tiny, "source_digest", lambda *_: "another")
    with pytest.raises(ErtaError, match="source changed since the run in .*work began"):
        train_tiny.check_source(commands.config("experiment=train_tiny"), work)
    train_tiny.check_source(commands.config("experiment=train_tiny", "resume=force"), work)
    train_tiny.check_source(commands.config("experiment=train_tiny", "resume=false"), work)
    assert not (work / "checkpoint.safetensors").exists() and list(
        tmp_path.glob("work.before-*/checkpoint.safetensors")
    )


def test_a_training_folder_of_another_world_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    """Mutants: checkpoints of the plain world that go on with rich pictures; a disk that fills up after hours."""
    train_tiny.check_source(commands.config("experiment=train_tiny"), tmp_path)
    with pytest.raises(ErtaError, match="model.world changed since the run in"):
        train_tiny.check_source(commands.config("experiment=train_tiny", "model.world=rich"), tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(train_tiny.shutil, "disk_usage", lambda _: full)
    with pytest.raises(ErtaError, match="1 MB free, and training takes 600: name another place"):
        train_tiny.check_source(commands.config("experiment=train_tiny"), tmp_path)
