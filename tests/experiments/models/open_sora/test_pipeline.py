"""The pipeline: times by hand, prompts as published, both branches in one batch, bad input, and every method on it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import erta
from erta.errors import ErtaError
from erta.policy import sources
from erta.scheduler import nominal_sigmas
from experiments.harness import catalogue
from experiments.harness.arm import make_arm
from experiments.harness.setup import Setup
from experiments.models.call import call_grid
from experiments.models.load import load_pipeline, set_sampler
from experiments.models.open_sora.pipeline import OpenSoraPipeline, clean, scores
from experiments.models.open_sora.sizes import latent_frames, rectified_flow, time_shift
from tests.commands import config, folders
from tests.pipelines import OPEN_SORA_CALL, PROMPTS, SITE_MASK, build_open_sora, generate

SIZE = [f"model.{key}={value}" for key, value in OPEN_SORA_CALL.items()]
OPEN_SORA = ["model=open_sora_12", "model.dtype=float32", "model.prompt_source=scenes", *SIZE]


def test_times_by_hand():
    """480x854 and 51 frames: r = sqrt(409920 / 262144) sqrt(15) = 4.84312; 240x426 and 102: sqrt(102240 / 262144) sqrt(30).

    Mutants: the shift of the latent's own pixels (848), all frames for latent ones, the evenly spaced times.
    """
    assert time_shift(480, 854, 51) == pytest.approx(4.84312, abs=1e-5)
    assert time_shift(240, 426, 102) == pytest.approx(3.42059, abs=1e-5)
    pipe = build_open_sora()
    call = {**OPEN_SORA_CALL, "num_inference_steps": 30, "height": 480, "width": 854, "num_frames": 51}
    sigmas = call_grid(pipe, call).sigmas
    assert sigmas.shape == (31,) and sigmas[30] == 0
    # 1000 r t / (1 + (r - 1) t) with t = 1, 29/30, 1/2, 1/30
    np.testing.assert_allclose(1000 * sigmas[[0, 1, 15, 29]], [1000, 992.930, 828.859, 143.105], atol=2e-3)


def test_a_step_goes_along_the_velocity():
    """`z += v (t_i - t_{i+1}) / 1000` with v towards the data, which is minus what the transformer gives here."""
    scheduler = rectified_flow()
    scheduler.set_timesteps(sigmas=[1.0, 0.5], device="cpu", mu=0.0)
    latent, towards_data = torch.zeros(1, 4, 5, 2, 2), torch.full((1, 4, 5, 2, 2), 2.0)
    for time, there in zip(scheduler.timesteps, (1.0, 2.0), strict=True):
        latent = scheduler.step(-towards_data, time, latent, return_dict=False)[0]
        torch.testing.assert_close(latent, torch.full_like(latent, there))


def test_latent_frames():
    assert [latent_frames(frames) for frames in (17, 34, 51, 102)] == [5, 10, 15, 30]
    for frames, near in ((16, 17), (50, 51), (1, 17), (60, 68)):
        with pytest.raises(ErtaError, match=f"multiple of 17 frames, and {frames} is none: take {near}"):
            latent_frames(frames)


def test_prompts_are_written_as_published():
    """Cleaned as the captions were, with the scores behind. Mutants: no score, a score that is cleaned away."""
    said = clean("A <b>Red</b> Circle  moving LEFT (slowly)" + scores(6.5, None, None))
    assert said == "a red circle moving left slowly aesthetic score: 6.5."
    assert scores(5, 2.25, "pan left") == " aesthetic score: 5.0. motion score: 2.2. camera motion: pan left."
    assert scores(None, None, None) == ""


def test_both_branches_run_in_one_batch():
    """The first step by hand: without text first, given text second, both with the prompt's mask and times 0 … 1000.

    Mutants: the branches swapped, another mask for the branch without text, guidance of the wrong branch, a time in [0, 1].
    """
    pipe, seen = build_open_sora(), []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    noise = torch.randn(2, 4, 5, 4, 7, generator=torch.Generator().manual_seed(0))
    steps = []

    def keep(pipe, step, timestep, values):
        steps.append(values["latents"])
        return values

    call = {**OPEN_SORA_CALL, "latents": noise, "output_type": "latent", "callback_on_step_end": keep}
    pipe(prompt=["a small red circle", "a large blue star moving left"], **call)
    handle.remove()
    first = seen[0]
    assert len(seen) == len(SITE_MASK) == pipe.num_timesteps and len(first["hidden_states"]) == 4
    assert first["without_text"].tolist() == [True, True, False, False] and first["timestep"].tolist() == [1000.0] * 4
    mask = first["encoder_attention_mask"]
    assert torch.equal(mask[:2], mask[2:]) and mask[1].all() and not mask[0].all()
    assert (first["fps"][0], first["height"][0], first["width"][0]) == (24, 32, 56)

    def velocity(part: slice, without: bool) -> torch.Tensor:
        given = {key: value[part] if torch.is_tensor(value) else value for key, value in first.items()}
        given["without_text"] = torch.tensor([without] * 2)
        with torch.no_grad():
            return pipe.transformer(**given)[0]

    without, with_text = velocity(slice(0, 2), True), velocity(slice(2, 4), False)
    sigmas = nominal_sigmas(pipe.scheduler)
    expected = noise + float(sigmas[1] - sigmas[0]) * (without + 4.0 * (with_text - without))
    torch.testing.assert_close(steps[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without, with_text, atol=1e-3)


def test_without_guidance_there_is_one_branch():
    """Mutant: a second one that is computed for nothing."""
    pipe, call = build_open_sora(), {**OPEN_SORA_CALL, "guidance_scale": 1.0}
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=3, **call)
    assert calibration.signature["branches"] == ["cond"]
    assert erta.calibrate(pipe, PROMPTS[:1], window=3, **OPEN_SORA_CALL).signature["branches"] == ["uncond", "cond"]


def test_pairs_of_blocks_by_hand():
    """Tokens before the head at a reused step: those before the blocks, and the last computed difference.

    Mutants: the residual of the spatial blocks alone, positions not in the tokens before, blocks that still run.
    """
    pipe, before, after, calls = build_open_sora(), [], [], []
    transformer, embed = pipe.transformer, pipe.transformer.embed

    def noted(*args):
        made = embed(*args)
        before.append(made[0])
        return made

    transformer.embed = noted
    transformer.head.register_forward_pre_hook(lambda module, args: after.append(args[0]))
    transformer.blocks[1].temporal.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe, OPEN_SORA_CALL)
    sigmas = nominal_sigmas(pipe.scheduler)
    plan = erta.Plan(mask=SITE_MASK, sigmas=sigmas, nominal_sigmas=sigmas, site="blocks")
    before.clear(), after.clear(), calls.clear()
    with erta.cached(pipe, plan) as trace:
        generate(pipe, OPEN_SORA_CALL)
    assert len(calls) == sum(SITE_MASK)
    for step, source in enumerate(sources(SITE_MASK)):
        torch.testing.assert_close(after[step], before[step] + (after[source] - before[source]), rtol=1e-5, atol=1e-5)
    assert trace.cache_bytes == before[0].numel() * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_frames": 16}, "a multiple of 17 frames"),
        ({"latents": torch.zeros(1, 8, 5, 4, 7)}, r"shape \(1, 8, 5, 4, 7\); this call needs \(1, 4, 5, 4, 7\)"),
        ({"max_sequence_length": 17}, "texts of 16 tokens at most"),
        ({"height": 4}, "take at least 8 pixels"),
    ],
)
def test_bad_input_is_one_line(change, said):
    with pytest.raises(ErtaError, match=said) as caught:
        generate(build_open_sora(), {**OPEN_SORA_CALL, **change})
    assert len(str(caught.value).splitlines()) == 1


def test_saved_and_loaded_and_decoded(tmp_path, monkeypatch):
    """A folder of it is what model.path wants: the same frames. And tiles are the image part's.

    Mutants: a transformer that comes back with other weights, the solver without its shift.
    """
    pipe = build_open_sora()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(config(*OPEN_SORA, f"model.path={tmp_path / 'pipe'}", "model.vae_tiling=true"))
    assert isinstance(loaded, OpenSoraPipeline) and loaded.vae.spatial.use_tiling
    assert torch.equal(generate(loaded, OPEN_SORA_CALL), generate(pipe, OPEN_SORA_CALL))
    made = pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), **OPEN_SORA_CALL).frames
    assert made.shape == (1, 17, 32, 56, 3) and 0 <= made.min() < made.max() <= 1


def test_without_weights_all_three_are_named(monkeypatch):
    """And a checkpoint of another layout is not taken for one that is missing. Mutant: Wan's advice, one download of three."""

    def missing(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(OpenSoraPipeline, "from_pretrained", missing)
    with pytest.raises(ErtaError) as caught:
        load_pipeline(config("model=open_sora_12"))
    said = str(caught.value)
    for name in ("hpcai-tech/OpenSora-STDiT-v3", "hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"):
        assert f"hf download {name}" in said
    assert "open_sora.convert" in said and len(said.splitlines()) == 2

    def wrong(*args, **options):
        raise ErtaError("there is a checkpoint of Open-Sora 1.0 or 1.1")

    monkeypatch.setattr(OpenSoraPipeline, "from_pretrained", wrong)
    with pytest.raises(ErtaError, match=r"^there is a checkpoint of Open-Sora 1\.0"):
        load_pipeline(config("model=open_sora_12"))


def test_other_solvers_have_the_same_grid():
    """They take the shift by size from the pipeline. Mutant: a solver with its own."""
    grids = {}
    for sampler in ("default", "flow_match_euler", "unipc", "dpmpp"):
        pipe = build_open_sora()
        set_sampler(pipe, config("model=open_sora_12", f"sampler={sampler}"))
        grids[sampler] = call_grid(pipe, OPEN_SORA_CALL).sigmas
        generate(pipe, OPEN_SORA_CALL)
    for grid in grids.values():
        np.testing.assert_allclose(grid, grids["default"], atol=0.03)


def test_the_defaults_of_a_call_are_the_published_ones():
    """And those of conf/model. Mutant: one of the two changed alone."""
    defaults = {key: value.default for key, value in inspect.signature(OpenSoraPipeline.__call__).parameters.items()}
    model = config("model=open_sora_12").model
    published = dict(height=480, width=854, num_frames=51, num_inference_steps=30, guidance_scale=7.0, fps=24)
    assert {key: defaults[key] for key in published} == published == {key: model[key] for key in published}
    assert (defaults["aesthetic_score"], defaults["motion_score"], defaults["max_sequence_length"]) == (6.5, None, 300)


REFUSED = {
    "dbcache": "does not know STDiT3Transformer3DModel",
    "dbcache_taylor": "does not know STDiT3Transformer3DModel",
}
OPTIONS = {
    "delta_dit": ["cache.options.interval=2"],
    "t_gate": ["cache.options.after=2", "cache.options.warmup=1"],
    "pab": [
        "cache.options.spatial=2",
        "cache.options.temporal=3",
        "cache.options.cross=4",
        "cache.options.window=[0,1]",
    ],
    "fastercache": ["cache.options.spatial=2", "cache.options.window=[0,1]"],
    "easycache": ["cache.steps=4", "cache.options.warmup=2"],
    "taylorseer": ["cache.steps=4", "cache.options.warmup=1"],
    "sencache": ["cache.steps=4", "cache.options.first=10"],
    "gcache": ["cache.steps=3", "cache.options.trials=2"],
    "budcache": ["cache.steps=3", "cache.options.iterations=3"],
    "plan_grid": ["cache.steps=4"],
    "seacache": ["cache.steps=4", "cache.options.first=1", "cache.options.last=1"],
    "dicache": ["cache.steps=5"],
    "none": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", catalogue.names())
def test_every_method_runs_on_it(cache, tmp_path, monkeypatch):
    """Set up by the harness at its budget. Mutants: patterns of modules that match nothing, blocks that diffusers cannot name."""
    monkeypatch.chdir(tmp_path)
    pipe = build_open_sora()
    before = generate(pipe, OPEN_SORA_CALL)
    chosen = OPTIONS.get(cache, ["cache.steps=4"])
    quick = ["calibration.num_prompts=1", "calibration.knob_prompts=1", "calibration.window=4"]
    setup = Setup(config(*OPEN_SORA, f"cache={cache}", *chosen, *quick), pipe)
    if cache in REFUSED:
        with pytest.raises(ErtaError, match=REFUSED[cache]):
            make_arm(setup)
        return
    arm = make_arm(setup)
    with arm.put_on(pipe) as trace:
        made = generate(pipe, arm.kwargs)
    assert torch.isfinite(made).all()
    assert torch.equal(made, before) == (cache == "none")
    if trace is not None:
        assert set(trace.forwards) == {"cond_uncond"} and 1 <= trace.forwards["cond_uncond"] < len(SITE_MASK)
    assert torch.equal(generate(pipe, OPEN_SORA_CALL), before)


@pytest.mark.slow
def test_the_main_job_on_it(command, tmp_path):
    """`python run.py model=open_sora_12 cache=ertacache`, at the paper's threshold."""
    build_open_sora().save_pretrained(tmp_path / "tiny")
    scenes = [*OPEN_SORA, "model.height=64", "model.width=64"]  # the checker's size
    code, printed = command(*scenes, f"model.path={tmp_path / 'tiny'}", "cache=ertacache", "bench=fidelity")
    assert code == 0, printed
    assert len(folders(tmp_path)) == 1 and "0.18" in (folders(tmp_path)[0] / "plan.json").read_text()
