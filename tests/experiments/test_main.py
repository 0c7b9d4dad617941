"""The main job through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.runs import load_prompts, load_runs
from experiments.harness import arm
from tests.commands import folders
from tests.pipelines import build_flux


@pytest.mark.slow
def test_every_variant_is_a_key(command, tmp_path):
    """The plan that is run holds what was asked for, and a calibration of one site is not used at the other."""
    variants = ["cache.rel_l1_denominator=cached", "cache.rectifier=scalar", "cache.rectifier_form=sigmoid"]
    code, printed = command("bench=fidelity", "cache.site=blocks", *variants)
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["site"] == "blocks" and plan["report"]["rel_l1_denominator"] == "cached"
    assert plan["rectification"]["form"] == "sigmoid" and len(plan["rectification"]["gain"][0][0]) == 1
    (path,) = Path("outputs/calibrations").glob("*.safetensors")
    code, printed = command("bench=fidelity", f"calibration.path={path}")
    assert code == 1 and "site was 'blocks'" in printed


@pytest.mark.parametrize(
    "cache",
    [
        "ertacache",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "uniform", "fewer_steps", "plan_grid")),
    ],
)
def test_main_job(command, tmp_path, cache):
    code, printed = command(f"cache={cache}", "bench=fidelity")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    assert folder.name.endswith(f"_wan21_tiny_{cache}_fidelity") and str(folder / "report.html") in printed
    record = json.loads((folder / "record.json").read_text())
    steps = {"none": (6, 6), "fewer_steps": (3, 3), "plan_grid": (3, 3)}.get(cache, (6, 3))
    assert (record["steps"]["total"], record["steps"]["computed"]) == steps
    assert record["timing"]["forwards"] == 2 * steps[1] and record["timing"]["forwards_uncached"] == 12
    assert record["schema"] == "erta.record/2" and record["kind"] == "main" and len(record["prompts"]) == 3
    if cache == "none":
        assert record["metrics"]["psnr_db"] is None and record["metrics"]["identical"] is True
    else:
        assert record["metrics"]["psnr_db"] > 0
    assert "lpips" in record["missing"] or "lpips" in record["metrics"]
    assert set(record["metrics"]["scene_accuracy"]) >= {"shape", "colour", "background", "motion", "all"}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 6 and "http" not in page.split("</style>")[1]
    assert sorted(p.name for p in (folder / "figures").iterdir())[-1] == "step_map.png"
    assert (folder / "figures" / "psnr_per_frame.png").is_file() == (cache != "none")  # identical frames have no PSNR
    (row,) = load_runs(tmp_path / "outputs").to_dict("records")
    assert (row["cache"], row["computed"], row["prompts"]) == (cache, steps[1], 3)
    assert load_prompts(folder)["uncached.forwards"].tolist() == [12, 12, 12]


def test_interrupted_run_goes_on(command, tmp_path, monkeypatch):
    generate, calls, done = arm.generate, [], []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6 and not done:  # warm-up, two whole prompts, half of the third
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(arm, "generate", interrupted)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 130 and "goes on from there" in printed and "Traceback" not in printed
    (folder,) = folders(tmp_path)
    kept = (folder / "per_prompt.jsonl").read_text()
    assert kept.count("\n") == 2
    calls.clear()
    done.append(True)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 0 and "2 of 3 prompts are done" in printed and folders(tmp_path) == [folder]
    assert (folder / "per_prompt.jsonl").read_text().startswith(kept) and len(calls) == 3
    # finished: the same command starts a new run; and so does resume=false
    code, _ = command("cache=uniform", "bench=fidelity", "hydra.run.dir=outputs/x/again")
    assert code == 0 and len(folders(tmp_path)) == 2


def test_images_through_the_main_job(command, tmp_path):
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


@pytest.mark.parametrize("cache", ["ertacache", "meancache"])
def test_true_guidance_beside_an_embedded_one(command, cache):
    """Two forwards a step. Mutant: no negative prompt, without which the pipeline makes one."""
    told = ["model=flux_tiny", "model.guidance_scale=1", "model.true_cfg_scale=4", "model.num_inference_steps=4"]
    code, printed = command(
        *told, "bench=fidelity", f"cache={cache}", "cache.steps=3", "model.path=null", "hydra.run.dir=outputs/true",
        "model.num_frames=null", "model.height=64", "model.width=64",
    )  # fmt: skip
    assert code == 0, printed
    first = json.loads(Path("outputs/true/per_prompt.jsonl").read_text().splitlines()[0])
    assert (first["uncached"]["forwards"], first["cached"]["forwards"]) == (8, 6)
    code, printed = command("model.true_cfg_scale=4")
    assert code == 1 and "WanPipeline knows no true guidance" in printed
