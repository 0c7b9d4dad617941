"""The paper's models as configs: what is counted of them without weights, and images through the main job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import erta
from erta.errors import ErtaError
from experiments.config import CONF
from experiments.model_card import model_card, shown
from experiments.models import call_kwargs, call_sigmas, load_pipeline, set_sampler
from experiments.prompts import calibration_prompts
from experiments.prompts import test_prompts as prompts_of
from tests.conftest import CALL, PROMPTS, build_pipe
from tests.test_cli import command, weights  # noqa: F401
from tests.test_sites import FLUX_CALL, build_flux


def config(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize(
    ("model", "billions", "latent", "blocks_mb"),
    [
        ("wan21", 1.42, [16, 21, 60, 104], 2 * 21 * 30 * 52 * 1536 * 2 / 1e6),
        ("wan21_14b", 14.3, [16, 21, 90, 160], 2 * 21 * 45 * 80 * 5120 * 2 / 1e6),
        ("wan22_a14b", 28.6, [16, 21, 60, 104], 2 * 21 * 30 * 52 * 5120 * 2 / 1e6),
        ("flux_dev", 11.9, [4096, 64], 4096 * 3072 * 2 / 1e6),
        ("cogvideox_2b", 1.69, [13, 16, 60, 90], None),
        ("hunyuan_video", 12.8, [16, 33, 68, 120], None),
    ],
)
def test_cards_of_the_real_models(model, billions, latent, blocks_mb):
    """Sizes from the architecture alone. Mutant: one guidance branch, or float32, in the cache bytes."""
    card = model_card(config(f"model={model}"))
    assert card["parameters"] / 1e9 == pytest.approx(billions, rel=0.01) and card["latent_shape"] == latent
    assert card["cache_bytes"]["output"] == card["forwards_per_step"] * np.prod(latent) * 2
    assert blocks_mb is None or card["cache_bytes"]["blocks"] / 1e6 == pytest.approx(blocks_mb)
    tokens = np.prod(latent) / 64  # of 2x2 latents with 16 channels; a matrix takes two FLOPs an entry and token
    assert card["flops_per_forward"] > tokens * card["parameters"] / card["transformers"]
    assert 1 < card["calibration_generations"]["output"] < 1.01


def test_card_of_two_transformers():
    """A step runs one of them and the cache holds residuals of one. Mutants: both in a forward, one in the parameters."""
    both = model_card(config("model=wan22_a14b"))
    one = model_card(config("model=wan21_14b", "model.height=480", "model.width=832"))
    assert both["parameters"] == 2 * one["parameters"] and one["transformers"] == 1
    for key in ("flops_per_step", "cache_bytes"):
        assert both[key] == one[key], key
    assert dict(shown(both))["parameters"].startswith("28.577 billion in 2 of 14.288")
    assert dict(shown(one))["parameters"] == "14.288 billion"


def test_flops_by_hand():
    """Wan 1.3B: twelve widths squared a token and block, and attention over all tokens. Mutant: attention not counted."""
    tokens, width, ffn, blocks, text = 21 * 30 * 52, 1536, 8960, 30, 512
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * text * 2 * width**2
    attention = 4 * tokens * (tokens + text) * width
    card = model_card(config("model=wan21"))
    assert card["flops_per_forward"] == pytest.approx(blocks * (linear + attention), rel=0.01)
    assert card["calibration_generations"]["blocks"] == pytest.approx(1 + 16 * card["reused_step_share"]["blocks"])
    assert model_card(config("model=wan21", "model.guidance_scale=1"))["forwards_per_step"] == 1


def test_card_counts_what_a_run_keeps(pipe, tmp_path):
    """The counted cache bytes are those that a trace measures. Mutant: tokens of single latents."""
    pipe.save_pretrained(tmp_path)
    size = [f"model.{key}={CALL[key]}" for key in ("height", "width", "num_frames", "num_inference_steps")]
    card = model_card(config(f"model.path={tmp_path}", *size))
    for site in ("output", "blocks"):
        plan = erta.calibrate(pipe, PROMPTS[:1], site=site, window=4, **CALL).plan(steps=4)
        with erta.cached(pipe, plan) as trace:
            pipe(prompt=PROMPTS[0], output_type="latent", **CALL)
        assert card["cache_bytes"][site] == trace.cache_bytes
    assert 0.01 < card["reused_step_share"]["blocks"] < 0.9


def test_a_card_of_an_unknown_architecture(tmp_path):
    with pytest.raises(ErtaError, match=r"wan21_14b"):
        model_card(config("model=wan21", "model.name=mine"))


@pytest.mark.parametrize(("build", "call"), [(build_pipe, CALL), (build_flux, FLUX_CALL)])
def test_the_grid_is_the_one_of_the_call(build, call):
    """FLUX brings its own sigmas, shifted by image size. Mutants: the scheduler's default grid; a scheduler left over."""
    pipe = build()
    scheduler = pipe.scheduler
    sigmas = call_sigmas(pipe, call)
    assert pipe.scheduler is scheduler
    made_for = erta.calibrate(pipe, PROMPTS[:1], window=2, **call).signature["sigmas"]
    np.testing.assert_array_equal(sigmas, np.array(made_for, np.float32))


def test_images_through_the_main_job(command, tmp_path):  # noqa: F811
    """FLUX's pipeline and configuration at 64x64: calibrated, planned, run, measured; one frame, one forward a step."""
    build_flux().save_pretrained(tmp_path / "flux")
    code, printed = command(
        "model=flux_dev", "bench=fidelity", f"model.path={tmp_path / 'flux'}", "model.prompt_source=scenes",
        "model.dtype=float32", "cache.steps=3", "model.num_frames=null", "hydra.run.dir=outputs/flux",
    )  # fmt: skip
    assert code == 0, printed
    record = json.loads(Path("outputs/flux/record.json").read_text())
    assert record["steps"]["computed"] == 3 and record["metrics"]["psnr_db"] > 0
    assert record["memory"]["cache_bytes"] == 16 * 16 * 4 and Path("outputs/flux/report.html").is_file()


def test_vbench_calibration_prompts_come_last_in_its_tests():
    """Mutants: calibration on prompts that the first tests use; tests that change with the calibration's size."""
    pytest.importorskip("vbench")
    cfg = config("model=wan21", "bench.num_prompts=900")
    held_out = calibration_prompts(cfg)
    texts = [prompt.text for prompt in prompts_of(cfg)]
    assert len(held_out) == 20 and len(texts) == 900 and not {*held_out} & {*texts}
    more = config("model=wan21", "bench.num_prompts=900", "calibration.num_prompts=30")
    assert [prompt.text for prompt in prompts_of(more)] == texts and calibration_prompts(more)[:20] == held_out


def test_a_revision_is_asked_for_on_the_hub_only(monkeypatch, tmp_path):
    """Mutant: the pin dropped on its way to diffusers."""
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options.get("revision")))
        raise OSError("no network")

    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ErtaError, match="no weights"):
        load_pipeline(config("model=wan21", "model.revision=abc123"))
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "abc123")]


@pytest.mark.parametrize("model", ["wan21", "wan21_14b", "wan22_a14b", "flux_dev", "cogvideox_2b", "hunyuan_video"])
def test_weights_of_the_hub_are_pinned(model, monkeypatch):
    """Mutants: a branch for a commit; a message whose download command gets other weights than the run would."""
    cfg = config(f"model={model}")
    assert re.fullmatch("[0-9a-f]{40}", cfg.model.revision)

    def from_pretrained(source, **options):
        raise OSError("no network")

    monkeypatch.setattr(getattr(diffusers, cfg.model.pipeline), "from_pretrained", from_pretrained)
    with pytest.raises(ErtaError, match=f"{cfg.model.hub_id} --revision {cfg.model.revision} --local-dir {model}"):
        load_pipeline(cfg)


def test_other_solvers_take_the_shift_from_flux():
    """FLUX's shift follows from the image size, and its pipeline gives it to the solver: all have the same grid.

    Mutants: a solver without the shift (sigmas of evenly spaced steps), the model's own solver whatever was asked for,
    Euler on the grid that FluxPipeline leaves to solvers with flow sigmas.
    """
    grids, made = {}, {}
    for sampler in ("default", "flow_match_euler", "unipc", "dpmpp"):
        cfg = config("model=flux_tiny", f"sampler={sampler}")
        pipe = load_pipeline(cfg)
        kwargs = call_kwargs(cfg)
        grids[sampler] = call_sigmas(pipe, kwargs)
        generator = torch.Generator().manual_seed(0)
        prompt = "a large red circle on a dark background"
        made[sampler] = pipe(prompt=prompt, generator=generator, output_type="latent", **kwargs).images
    set_sampler(pipe, config("model=flux_tiny", "sampler=flow_match_euler"))  # on what another solver left
    np.testing.assert_array_equal(call_sigmas(pipe, kwargs), grids["default"])
    for sampler, grid in grids.items():
        np.testing.assert_allclose(grid, grids["default"], atol=0.02, err_msg=sampler)
    assert torch.equal(made["flow_match_euler"], made["default"])
    for sampler in ("unipc", "dpmpp"):
        change = (made[sampler] - made["default"]).abs().mean() / made["default"].abs().mean()
        assert 1e-4 < change < 0.3, sampler


@pytest.mark.parametrize("sampler", ["flow_match_euler", "dpmpp"])
def test_another_solver_needs_a_shift(sampler):
    """Mutant: a solver with no shift, which draws something else or fails far inside diffusers."""
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config={}))
    with pytest.raises(ErtaError, match=f"sampler={sampler}: it is not known how model=hunyuan_video shifts"):
        set_sampler(pipe, config("model=hunyuan_video", f"sampler={sampler}"))
