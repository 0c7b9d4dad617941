"""The methods that we compare with: each rule by hand, in the harness, and against another implementation."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXDDIMScheduler, HunyuanVideoTransformer3DModel
from hydra.utils import get_method

import erta
import experiments.peers
from erta.online import Call, OnlineRule, online
from experiments.methods import CACHES
from experiments.peers import magcache, teacache
from experiments.peers.constants import FILE, published
from experiments.peers.easycache import EasyCache
from experiments.peers.knob import Knob, search
from experiments.peers.magcache import MagCache
from experiments.peers.signals import modulated_input
from experiments.peers.teacache import TeaCache
from experiments.record import read_lines
from tests.conftest import STEPS, build_pipe, run
from tests.test_cli import command, folders, weights  # noqa: F401
from tests.test_sites import FLUX_CALL, WAN_CALL, build_cogvideox, build_flux, generate

README = Path(__file__).resolve().parents[1] / "README.md"


class Scripted(OnlineRule):
    """Computes where a list says so, and remembers what it was shown."""

    def __init__(self, *computed: int) -> None:
        self.steps, self.begun, self.asked, self.shown = computed, [], [], []

    def begin(self, num_steps: int) -> None:
        self.begun.append(num_steps)
        self.asked, self.shown = [], []

    def should_compute(self, call: Call) -> bool:
        self.asked.append((call.step, call.branch))
        return call.step in self.steps

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        self.shown.append((call.step, call.branch))
        torch.testing.assert_close(velocity - call.x, residual)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_an_online_cache_is_the_planned_one_when_it_decides_the_same(site):
    """Bit for bit the same clip, forwards and cache bytes as the plan with that mask.

    Mutants: a residual of the other branch, the step counted by calls, the cache left on, state kept between calls.
    """
    pipe = build_pipe()
    before, own = run(pipe), pipe.scheduler
    sigmas = pipe.scheduler.sigmas.numpy()
    mask = tuple(step in (0, 1, 4, 6) for step in range(STEPS))
    with erta.cached(pipe, erta.Plan(mask=mask, sigmas=sigmas, site=site)) as planned:
        expected = run(pipe)
    rule = Scripted(1, 4, 6)
    rule.computed = lambda *_: None
    with online(pipe, rule, site) as trace:
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe), expected)  # nothing is left of the first call
        assert trace.forwards == {"cond": 4, "uncond": 4} == planned.forwards and trace.calls == 2
        assert trace.cache_bytes == planned.cache_bytes > 0 and "forwards cond: 4, uncond: 4, of 8" in trace.summary()
        with pytest.raises(erta.InstallError, match="installed"):
            erta.install(pipe, erta.Plan(mask=mask, sigmas=sigmas))
    assert rule.begun == [STEPS, STEPS]
    assert rule.asked == [(step, branch) for step in range(1, STEPS) for branch in ("cond", "uncond")]
    assert torch.equal(run(pipe), before) and pipe.scheduler is own


def test_a_rule_sees_every_forward_and_resets_after_an_exception():
    pipe = build_pipe()
    rule = Scripted(2)
    with online(pipe, rule):
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=lambda *_: 1 / 0)
        first = run(pipe)
        assert rule.shown == [(0, "cond"), (0, "uncond"), (2, "cond"), (2, "uncond")]
    with online(build_pipe(), Scripted(2)):
        pass
    with online(pipe, Scripted(2)):
        assert torch.equal(run(pipe), first)


def test_a_run_that_computes_everything_says_so():
    pipe = build_pipe()
    before = run(pipe)
    with online(pipe, Scripted(*range(STEPS))) as trace:
        assert torch.equal(run(pipe), before)
    assert not trace.reused_anything() and trace.summary().startswith("did not reuse anything")


def test_an_interrupted_pipeline_is_refused():
    """Mutant: the check at the end of a call left out, so half a run passes for a whole one."""
    pipe = build_pipe()

    def stop(pipe, step, timestep, values):
        pipe._interrupt = step >= 3
        return values

    with online(pipe, Scripted(2)), pytest.raises(erta.ExecutionMismatch, match="called at 4 steps"):
        run(pipe, callback_on_step_end=stop)


def decisions(rule: OnlineRule, xs, velocity, branches=("cond",)) -> dict[str, list[bool]]:
    """What a rule decides along made-up inputs (num_steps) of one value each; `velocity(step, branch)` is the output."""
    rule.begin(len(xs))
    made: dict[str, list[bool]] = {branch: [] for branch in branches}
    for step, value in enumerate(xs):
        for branch in branches:
            call = Call(step, len(xs), branch, torch.full((1, 1, 4), float(value)), torch.nn.Identity())
            compute = not made[branch] or rule.should_compute(call)
            made[branch].append(compute)
            if compute:
                v = torch.full_like(call.x, float(velocity(step, branch)))
                rule.computed(call, v, v - call.x)
    return made


def test_easycache_by_hand():
    """warmup 2, tau 0.5; inputs 10, 8, 7, 6, 4, 3, 2, 1, outputs 2, 4, 5 (step 2) …

    steps 0, 1: warm-up; k = |4 - 2| / |8 - 10| = 1
    step 2: acc = 1 · |7 - 8| / 4 = 0.25 < 0.5: reused
    step 3: acc += |6 - 7| / 4 = 0.5, not below 0.5: computed; v = 8; k = |8 - 4| / |6 - 8| = 2; acc = 0
    step 4: acc = 2 · |4 - 6| / 8 = 0.5: computed; v = 16; k = |16 - 8| / |4 - 6| = 4
    step 5: acc = 4 · |3 - 4| / 16 = 0.25: reused
    step 6: acc += 4 · |2 - 3| / 16 = 0.5: computed; v = 32; k = |32 - 16| / |2 - 4| = 8
    step 7: acc = 8 · 1 / 32 = 0.25, but the last step is computed

    Mutants: k from the last step instead of the last computed one, the sum not cleared, `<=` for `<`, the input's
    change since the last computed step added up, the last step reused.
    """
    xs, v = [10, 8, 7, 6, 4, 3, 2, 1], {0: 2, 1: 4, 3: 8, 4: 16, 6: 32, 7: 64}
    made = decisions(EasyCache(0.5, warmup=2), xs, lambda step, branch: v[step])
    assert made["cond"] == [True, True, False, True, True, False, True, True]


def test_easycache_decides_for_both_branches_by_the_first():
    """The second branch's outputs (k = 0 of its own) change nothing. Mutant: a decision for each branch."""
    xs, v = [10, 8, 7, 6, 4, 3, 2, 1], {0: 2, 1: 4, 3: 8, 4: 16, 6: 32, 7: 64}
    both = decisions(EasyCache(0.5, 2), xs, lambda step, b: v[step] if b == "cond" else 1, ("cond", "uncond"))
    assert both["cond"] == both["uncond"] == [True, True, False, True, True, False, True, True]


def test_teacache_by_hand():
    """p(r) = 2 r, delta 1.25; signal 8, 10, 11.25, 14.0625, 14.0625, 17.578125, 17.578125

    step 1: r = 2 / 8 = 0.25, acc = 0.5: reused            (r is against the step before, computed or not)
    step 2: r = 1.25 / 10 = 0.125, acc = 0.75: reused      (against the computed step 0 it were 1.3125: computed)
    step 3: r = 2.8125 / 11.25 = 0.25, acc = 1.25, not below delta: computed, acc = 0
    step 4: r = 0: reused                                  (had acc not been cleared: computed)
    step 5: r = 0.25, acc = 0.5: reused
    step 6: the last step: computed

    A branch with another signal decides for itself. Mutants: those named, `>` for `>=`, one sum for both branches.
    """
    signal = [8, 10, 11.25, 14.0625, 14.0625, 17.578125, 17.578125]
    rule = TeaCache(1.25, [2, 0], lambda call: call.x if call.branch == "cond" else torch.ones(3))
    made = decisions(rule, signal, lambda *_: 1.0, ("cond", "uncond"))
    assert made["cond"] == [True, False, False, True, False, False, True]
    assert made["uncond"] == [True, False, False, False, False, False, True]


def test_teacache_polynomial():
    """A polynomial is found again; three different signals determine a parabola. Mutant: lowest power first."""
    r = np.linspace(0.1, 0.9, 30)
    np.testing.assert_allclose(
        teacache.fit(list(zip(r, 3 * r**2 - r + 0.5, strict=True))), [0, 0, 3, -1, 0.5], atol=1e-9
    )
    np.testing.assert_allclose(teacache.fit([(1, 2), (2, 5), (3, 10), (3, 10)]), [1, 0, 1], atol=1e-9)


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


RATIOS = [1.0, 1.0, 0.9, 1.0, 1.0, 0.8, 0.9, 1.1]


def test_magcache_by_hand():
    """8 steps, retention 0.25, delta 0.35, at most 2 in a row; ratios as above.

    steps 0, 1: retention                   step 2: R = 0.9, E = 0.1, k = 1: reused
    step 3: R = 0.9, E = 0.2, k = 2: reused step 4: k = 3: computed, R, E, k anew
    step 5: R = 0.8, E = 0.2: reused        step 6: R = 0.72, E = 0.48 > 0.35: computed
    step 7: R = 1.1, E = 0.1: reused (the last step is not forced)

    Mutants: the step's ratio in place of the product (step 6 reused), k or E not cleared, the branches' lists swapped.
    """
    calm = [1.0] * 8
    rule = MagCache(0.35, 2, 0.25, {"cond": RATIOS, "uncond": calm})
    made = decisions(rule, range(8), lambda *_: 1.0, ("cond", "uncond"))
    assert made["cond"] == [True, True, False, False, True, False, True, False]
    assert made["uncond"] == [True, True, False, False, True, False, False, True]
    with pytest.raises(erta.ErtaError, match="for 8 steps, not 6"):
        rule.begin(6)


def test_magcache_ratios():
    """Norms over the last axis are (5, 10), then (10, 10), then (5, 30): ratios 1, (2 + 1) / 2, (0.5 + 3) / 2."""
    recorder = magcache.RatioRecorder()
    recorder.begin(3)
    shape = torch.tensor([0.6, 0.8])
    for step, sizes in enumerate([(5, 10), (10, 10), (5, 30)]):
        residual = torch.tensor(sizes, dtype=torch.float32)[None, :, None] * shape
        recorder.computed(Call(step, 3, "cond", residual, torch.nn.Identity()), residual, residual)
    assert recorder.ratios["cond"] == pytest.approx([1, 1.5, 1.75])


def test_published_constants_are_for_their_model_and_steps(tmp_path):
    """Mutants: chosen by name, another model's handed out, another number of steps accepted."""
    pipe = build_pipe()
    with pytest.raises(erta.ErtaError, match="for Wan2.1-T2V-1.3B, .*, FLUX.1-dev, .*CogVideoX-5B, not for this Wan"):
        published("teacache", pipe, 50)
    known = yaml.safe_load(FILE.read_text())
    entries = [entry for method in known.values() for entry in method]
    assert all(entry["source"] and entry["model"]["class"] and entry["num_steps"] for entry in entries)
    assert all({len(ratios) for ratios in e["ratios"].values()} == {e["num_steps"]} for e in known["magcache"])
    wan, flux, hunyuan = known["magcache"]
    assert (flux["num_steps"], hunyuan["ratios"]["cond"][-1]) == (28, 0.76592)
    assert wan["ratios"]["cond"][1:3] == [1.0124, 1.00166] and wan["ratios"]["uncond"][-1] == 0.81939
    # at 0.05, by hand: 0.01498 - 0.16389 + 0.50333 - 0.41493 + 0.13789
    assert np.polyval(known["teacache"][0]["coefficients"], 0.05) == pytest.approx(0.07738, abs=1e-5)
    wan["model"] = {"class": "WanTransformer3DModel", "num_layers": 2, "num_attention_heads": 2}
    file = tmp_path / "constants.yaml"
    file.write_text(yaml.safe_dump(known))
    assert published("magcache", pipe, 50, file)["ratios"]["cond"][0] == 1.0
    with pytest.raises(erta.ErtaError, match="for 50 steps, not 28"):
        published("magcache", pipe, 28, file)
    known["teacache"][0]["model"] = wan["model"]
    file.write_text(yaml.safe_dump(known))
    assert published("teacache", pipe, 50, file)["coefficients"][-1] == 0.137887774
    with pytest.raises(erta.ErtaError, match="of teacache for Wan2.1-T2V-1.3B are for 50 steps, not 30"):
        published("teacache", pipe, 30, file)


@pytest.mark.slow
def test_fewer_steps_with_another_solver(command, tmp_path):  # noqa: F811
    """The uncached run keeps its own solver; the other's grid is recorded. Mutant: both arms under one solver."""
    code, printed = command("cache=fewer_steps", "bench=fidelity", "hydra.run.dir=outputs/a/own")
    assert code == 0, printed
    code, printed = command("cache=fewer_steps_euler", "bench=fidelity", "hydra.run.dir=outputs/a/euler")
    assert code == 0, printed
    own, euler = (
        json.loads((tmp_path / "outputs" / "a" / name / "record.json").read_text()) for name in ("own", "euler")
    )
    assert euler["timing"]["forwards"] == own["timing"]["forwards"] == 6 and euler["steps"]["without_reuse"] == 0
    assert len(euler["sigmas"]) == 4 and euler["metrics"]["psnr_db"] != own["metrics"]["psnr_db"]
    frames = [
        (tmp_path / "outputs" / "a" / name / "samples" / "uncached" / "000.mp4").read_bytes()
        for name in ("own", "euler")
    ]
    assert frames[0] == frames[1]


def test_how_to_add_a_method_as_the_readme_says(command, tmp_path, monkeypatch):  # noqa: F811
    """The two files of the README, in a temporary folder, and nothing else."""
    section = README.read_text().split("## How to add a method")[1].split("\n## ")[0]
    code, config = (block.split("```")[0] for block in re.split(r"```(?:python|yaml)\n", section)[1:3])
    (tmp_path / "new" / "cache").mkdir(parents=True)
    (tmp_path / "new" / "every_nth.py").write_text(code)
    (tmp_path / "new" / "cache" / "every_nth.yaml").write_text(config)
    monkeypatch.setattr(experiments.peers, "__path__", [*experiments.peers.__path__, str(tmp_path / "new")])
    status, printed = command(
        "cache=every_nth", "bench=fidelity", "cache.steps=3", f"hydra.searchpath=[file://{tmp_path / 'new'}]"
    )
    assert status == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"]["computed"] == 3 and record["steps"]["mask"] == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "path", sorted(set(CACHES.glob("*.yaml")) - {CACHES / "none.yaml"}), ids=lambda path: path.stem
)
def test_every_method_is_described(path):
    """Site, what it stores, static or online, the paper, where ours deviates. Mutant: any of the five left out."""
    made = get_method(yaml.safe_load(path.read_text())["_target_"])
    text = " ".join(f"{made.__doc__} {sys.modules[made.__module__].__doc__}".split())
    missing = [what for what, pattern in DESCRIBED.items() if not re.search(pattern, text)]
    assert not missing, f"{made.__module__}.{made.__name__}: {missing}"


DESCRIBED = {
    "site": r"Site: ",
    "stored": r"Stored(:| in each guidance branch:)",
    "static or online": r"Static|[Oo]nline",
    "paper": r"arXiv \d{4}\.\d{5}|\(\w+, [\w-]+/\w+\)|[Bb]aseline of ours|cache-dit",
    "deviations": r"Where we differ:",
}


def test_options_are_checked():
    with pytest.raises(erta.ErtaError, match="options.warmup must be a whole number ≥ 1, not 0"):
        EasyCache(0.1, warmup=0)
    with pytest.raises(erta.ErtaError, match="options.tau must be a number ≥ 0, not 'much'"):
        EasyCache("much")


def test_search_meets_the_budget_or_says_what_can_be_met():
    """Counts that fall with the knob as 40 / value, down to 10. Mutants: bisection turned round, arithmetic halves."""
    report = search(lambda value: max(10.0, 40 / value), Knob("tau", 1e-2, 1e2), 25, "m", 50)
    assert report["computed"] == pytest.approx(25, abs=0.5) and report["value"] == pytest.approx(1.6, rel=0.03)
    assert 3 <= len(report["tried"]) <= 14
    with pytest.raises(erta.BudgetError, match="reaches 10 to 50"):
        search(lambda value: max(10.0, 40 / value), Knob("tau", 1e-2, 1e2), 9, "m", 50)
    with pytest.raises(erta.BudgetError, match="cache=m did not reuse anything: also with tau=100 all 50 steps"):
        search(lambda value: 50.0, Knob("tau", 1e-2, 1e2), 25, "m", 50)
    # whole numbers 1 … 8 give 50, 26, 18, 14, 11.2 …: 20 cannot be met, 18 is the most below it; 26 can
    jumps = {1: 50, 2: 26, 3: 18, 4: 14, 5: 11, 6: 9, 7: 8, 8: 7}
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 20, "m", 50)["value"] == 3
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 26, "m", 50)["value"] == 2
    assert search(jumps.__getitem__, Knob("interval", 1, 8, whole=True), 50, "m", 50)["value"] == 1


def test_online_on_a_model_with_one_forward_a_step():
    """FLUX: packed tokens, no second branch."""
    pipe = build_flux()
    before = generate(pipe, FLUX_CALL)
    with online(pipe, EasyCache(0.6, warmup=2)) as trace:
        cached = generate(pipe, FLUX_CALL)
    assert 3 <= trace.forwards["cond"] < 6 and list(trace.forwards) == ["cond"]
    assert 0 < (cached - before).abs().mean() < before.abs().mean()
    assert torch.equal(generate(pipe, FLUX_CALL), before)


PEERS = {
    "easycache": ["cache.steps=4", "cache.options.warmup=2"],
    "teacache": ["cache.steps=4"],
    "magcache": ["cache.steps=4"],
    "first_block": ["cache.steps=5"],
    "taylorseer": ["cache.steps=4", "cache.options.warmup=1"],
    "magcache_diffusers": ["cache.steps=5"],
    "seacache": ["cache.steps=4"],
    "meancache": ["cache.steps=4"],
    "fastercache": ["cache.options.spatial=2"],
    "pab": ["cache.options.window=[0,1]", "cache.options.spatial=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", PEERS)
def test_in_the_harness(command, tmp_path, cache):  # noqa: F811
    """Through the command line: the budget is met on calibration prompts, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", *PEERS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    report, rows = record["plan_report"], read_lines(folder / "per_prompt.jsonl")
    if "asked" in report:
        assert f"cache.steps={report['asked']}" in PEERS[cache] and report["computed"] <= report["asked"] + 0.5
        assert f"{cache}: {report['knob']}=" in printed
    made = [row["cached"]["forwards"] for row in rows]
    assert record["timing"]["forwards"] == pytest.approx(sum(made) / 3) and max(made) < 12
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and record["steps"]["total"] == 6
    assert record["steps"]["mask"] == rows[0]["cached"]["mask"] and record["steps"]["without_reuse"] == 0
    assert record["metrics"]["psnr_db"] > 0 and record["memory"]["cache_bytes"] > 0
    assert (folder / "figures" / "step_map.png").stat().st_size > 5000


def test_a_knob_by_its_own_key_and_a_run_that_reuses_nothing(command, tmp_path):  # noqa: F811
    """Mutants: the knob ignored, two budgets at once accepted, an idle cache reported as identical."""
    code, printed = command("cache=easycache", "bench=fidelity", "cache.options.tau=0", "cache.options.warmup=2")
    assert code == 0 and "did not reuse anything: 3 of 3 samples" in printed and "identical" not in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"]["without_reuse"] == 3 and record["plan_report"] == {"knob": "tau", "value": 0}
    code, printed = command("cache=easycache", "cache.options.tau=0.1", "cache.steps=3")
    assert code == 1 and "cache.options.tau and cache.steps at once" in printed
    code, printed = command("cache=easycache", "cache.steps=3", "cache.options.warmup=4")
    assert code == 1 and "reaches 5 to 6" in printed
    code, printed = command("cache=sencache", "cache.options.epsilon=-1")
    assert code == 1 and "cache.options.epsilon must be ≥ 0, not -1" in printed and "uncached runs" not in printed
    code, printed = command("cache=fewer_steps", "cache.options.sampler=heun")
    assert code == 1 and "cache.options.sampler" in printed and "unipc" in printed and "no such file" not in printed
    code, printed = command("cache=easycache", "cache.options.tua=0.1")
    assert code == 1 and "unknown key cache.options.tua" in printed
