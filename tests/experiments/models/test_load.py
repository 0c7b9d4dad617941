"""The paper's models as configs: what is counted of them without weights, and images through the main job."""

from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from erta.errors import ErtaError
from experiments.models.call import call_grid, call_kwargs
from experiments.models.load import load_pipeline, set_sampler
from tests.commands import config


def test_truncated_and_missing_weights(command, weights, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, printed = command(f"model.path={broken}")
    assert code == 1 and "damaged or truncated" in printed
    file.unlink()
    code, printed = command(f"model.path={broken}")
    assert code == 1 and "has no weights" in printed


def test_real_model_without_weights_says_what_to_do(command):
    code, printed = command("model=wan21", quick=False)
    assert code == 1 and "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in printed and "model=wan21_tiny" in printed


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
        grids[sampler] = call_grid(pipe, kwargs).sigmas
        generator = torch.Generator().manual_seed(0)
        prompt = "a large red circle on a dark background"
        made[sampler] = pipe(prompt=prompt, generator=generator, output_type="latent", **kwargs).images
    set_sampler(pipe, config("model=flux_tiny", "sampler=flow_match_euler"))  # on what another solver left
    np.testing.assert_array_equal(call_grid(pipe, kwargs).sigmas, grids["default"])
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
