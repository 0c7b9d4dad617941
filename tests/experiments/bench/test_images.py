"""FID and CLIP score: what torchmetrics computes through our wrappers is what a hand computation gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from scipy import linalg, ndimage

from erta.errors import ErtaError
from experiments.bench import images
from experiments.bench.images import (
    CLIP_TINY,
    ClipFeatures,
    clip_scores,
    fid,
    image_files,
    load_clip,
    load_networks,
    read_image,
)
from experiments.harness.config import CONF
from experiments.prompts.choose import Prompt, scene_prompts
from experiments.scenes import Object, Scene, caption, render, sample_scene, sample_scenes
from experiments.training.clip import IMAGE_MEAN, IMAGE_STD, build_clip, build_processor, twin

PROMPTS = ["a small red circle on a dark background", "a large blue star on a striped background"]


@pytest.fixture(scope="module")
def random_clip():
    processor = build_processor()
    return build_clip(len(processor.tokenizer), 0).eval(), processor


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["model=flux_tiny", "bench=fid_clip", *overrides])


def test_clip_score_is_the_hundredfold_cosine(random_clip):
    """Mutants: embeddings before the projection, pixels scaled twice, prompts in another order."""
    model, processor = random_clip
    pictures = noise(2)
    found = clip_scores(pictures, PROMPTS, model, processor)
    pixels = (pictures.float() / 255 - IMAGE_MEAN) / IMAGE_STD
    tokens = processor.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output).numpy()
        read = model.text_projection(model.text_model(**tokens).pooler_output).numpy()
    cosines = (seen * read).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(read, axis=1)
    np.testing.assert_allclose(found, 100 * np.maximum(cosines, 0), rtol=1e-4, atol=1e-4)
    assert np.abs(cosines).max() > 0.01


def test_captions_longer_than_the_context_are_cut_with_their_end(random_clip, capsys):
    """As the tokenizer cuts them, the end token kept, from which CLIP reads. Mutants: the end cut off; nothing said."""
    model, processor = random_clip
    context, picture = images.context_of(model), noise(1)
    long = " ".join(["red circle"] * context)
    words = ["red", "circle"] * context
    cut = " ".join(words[: context - 1])  # and the end
    assert processor.tokenizer(cut)["input_ids"][-1] == processor.tokenizer.eos_token_id
    found, wanted = (clip_scores(picture, [text], model, processor) for text in (long, cut))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    pixels = (picture.float() / 255 - IMAGE_MEAN) / IMAGE_STD
    tokens = processor.tokenizer([cut], return_tensors="pt")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        read = model.text_projection(model.text_model(**tokens).pooler_output)
    assert float(found[0]) == pytest.approx(100 * max(0.0, float(torch.cosine_similarity(seen, read))), abs=1e-3)
    assert images.captions_cut([long, cut, PROMPTS[0]], model, processor) == 1
    assert f"1 of 3 captions are longer than the {context} tokens" in " ".join(capsys.readouterr().out.split())
    assert images.captions_cut(PROMPTS, model, processor) == 0 and not capsys.readouterr().out


def test_one_reference_serves_many_sets(random_clip):
    """As `fid` gives it for each alone. Mutants: the images of the set before kept; the reference's forgotten."""
    features = ClipFeatures(*random_clip)
    distance = images.fid_to(features, noise(6, 1))
    for seed in (2, 3):
        assert distance(noise(5, seed)) == fid(features, noise(6, 1), noise(5, seed))


def test_fid_is_the_distance_of_two_gaussians(random_clip):
    """Mutants: embeddings not normalised, biased covariances, generated and reference counted together."""
    features = ClipFeatures(*random_clip)
    real, made = noise(80, 1), noise(70, 2) // 2
    found = fid(features, iter(real), iter(made))
    a, b = features(real).double().numpy(), features(made).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, rtol=1e-5)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    wanted = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.trace(linalg.sqrtm(cov_a @ cov_b).real)
    )
    assert found == pytest.approx(wanted, rel=1e-3) and found > 1e-4
    assert fid(features, iter(real), iter(real)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model=wan21_tiny"], "makes videos"),
        (["bench.num_prompts=1"], "at least 2 images"),
        (["bench.num_reference=1"], "at least 2 reference images"),
        (["bench.reference=nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_scored_is_refused_beforehand(overrides, part):
    with pytest.raises(ErtaError, match=part):
        images.check(config(*overrides))


def test_a_broken_reference_image_is_named(tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ErtaError, match="holds 1 images"):
        image_files(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ErtaError, match=r"b\.png is not a readable image"):
        images.check(config(f"bench.reference={tmp_path}"))
    assert read_image(tmp_path / "a.png").shape == (3, 64, 64)


def test_a_missing_clip_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ErtaError, match=r"hf download openai/clip-vit-base-patch16 .*bench\.clip="):
        load_clip("openai/clip-vit-base-patch16")
    with pytest.raises(ErtaError, match="no CLIP at"):
        load_clip(tmp_path)


def test_a_twin_differs_in_one_attribute():
    """Mutant: the object's colour may become that of the other one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng, picture=True)
        other = twin(scene, rng)
        pairs = zip(scene.objects, other.objects, strict=True)
        changes = sum(getattr(a, k) != getattr(b, k) for a, b in pairs for k in ("shape", "colour", "size"))
        assert changes + (scene.background != other.background) + (scene.relation != other.relation) == 1
        assert len({o.colour for o in other.objects}) == len(other.objects)
        assert render(other, rng).shape == (1, 64, 64, 3)


def test_clip_tiny_finds_the_right_caption_among_a_hundred():
    """50 held-out pictures and their twins' captions: every caption has one that differs in one attribute only."""
    model, processor = load_clip(CLIP_TINY)
    rng, right = np.random.default_rng(3), []
    for _ in range(2):
        scenes = sample_scenes(50, "test", int(rng.integers(1000)), picture=True)
        everything: list[Scene] = [*scenes, *(twin(scene, rng) for scene in scenes)]
        pixels = torch.from_numpy(np.concatenate([render(scene, rng) for scene in scenes])).permute(0, 3, 1, 2)
        tokens = processor.tokenizer([caption(s, rng) for s in everything], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(pixel_values=(pixels - IMAGE_MEAN) / IMAGE_STD, **tokens).logits_per_image
        right += (logits.argmax(1) == torch.arange(50)).tolist()
    print(f"\nright caption among 100: {np.mean(right):.0%}")
    assert np.mean(right) >= 0.8


@pytest.mark.slow
def test_the_metrics_get_worse_with_blur_and_with_shuffled_captions():
    """Mutants: features of the prompts, images rescaled twice, scores of the wrong pairs."""
    model, processor = load_clip(CLIP_TINY)
    prompts = scene_prompts(60, "test", 4, picture=True)
    rng = np.random.default_rng(0)
    clean = np.concatenate([render(prompt.scene, rng) for prompt in prompts])
    reference = np.concatenate([render(prompt.scene, rng) for prompt in prompts])

    def tensors(pictures: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.round(pictures * 255).astype(np.uint8)).permute(0, 3, 1, 2)

    features, texts = ClipFeatures(model, processor), [prompt.text for prompt in prompts]
    blurred = [tensors(ndimage.gaussian_filter(clean, (0, s, s, 0)) if s else clean) for s in (0, 1.5, 4)]
    distances = [fid(features, iter(tensors(reference)), iter(pictures)) for pictures in blurred]
    scores = [clip_scores(pictures, texts, model, processor).mean() for pictures in blurred]
    assert distances[0] < distances[1] < distances[2] and scores[0] > scores[1] > scores[2]
    assert clip_scores(blurred[0], texts[1:] + texts[:1], model, processor).mean() < scores[0] - 5


def test_clip_tiny_scores_no_words_that_it_has_not_seen():
    """Mutant: pictures of another world scored, where their captions happen to hold no word that it lacks."""
    scene = Scene((Object("star", "red", "small"),), "dark", None, world="rich")
    networks = load_networks(config(), [Prompt("a small red star", 0, scene, id="000")])
    assert networks.clip is None and "tinyclip" not in networks.features
    for name in ("clip_score_tinyclip", "fid_tinyclip"):
        assert networks.missing[name] == "clip_tiny knows the plain world alone"
    plain = Prompt("a small red star", 0, replace(scene, world="plain"), id="000")
    assert load_networks(config(), [plain]).clip is not None
