"""The command line: the main job on an untrained tiny pipeline, and every bad input that people type."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

import erta
from analysis.runs import load_prompts, load_runs
from experiments import cli, main_job
from experiments.record import read_lines
from tests.conftest import build_pipe

QUICK = [
    "model.num_inference_steps=6",
    "model.height=64",
    "model.width=64",
    "model.num_frames=5",
    "calibration.num_prompts=2",
    "calibration.window=4",
    "bench.num_prompts=3",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "pipe"
    build_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, weights):
    """Run `run.py` with arguments in an empty folder: (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, quick: bool = True) -> tuple[int, str]:
        given = [*QUICK, f"model.path={weights}"] if quick else []
        flags = [argument for argument in arguments if argument == "-m"]  # Hydra wants them before the overrides
        overrides = [argument for argument in arguments if argument != "-m"]
        monkeypatch.setattr(sys, "argv", ["run.py", *flags, *given, *overrides])
        GlobalHydra.instance().clear()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def folders(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in tmp_path.glob("outputs/*/*/state.json"))


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


@pytest.mark.parametrize("cache", ["none", "uniform", "fewer_steps", "plan_grid", "ertacache"])
def test_main_job(command, tmp_path, cache):
    code, printed = command(f"cache={cache}", "bench=fidelity")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    assert folder.name.endswith(f"_wan21_tiny_{cache}_fidelity") and str(folder / "report.html") in printed
    record = json.loads((folder / "record.json").read_text())
    steps = {"none": (6, 6), "fewer_steps": (3, 3), "plan_grid": (3, 3)}.get(cache, (6, 3))
    assert (record["steps"]["total"], record["steps"]["computed"]) == steps
    assert record["timing"]["forwards"] == 2 * steps[1] and record["timing"]["forwards_uncached"] == 12
    assert record["schema"] == "erta.record/1" and len(record["prompts"]) == 3
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
    generate, calls, done = main_job.generate, [], []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6 and not done:  # warm-up, two whole prompts, half of the third
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(main_job, "generate", interrupted)
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


def test_calibration_is_reused_and_resumed(command, tmp_path, monkeypatch):
    code, printed = command("bench=fidelity")
    assert code == 0, printed
    code, printed = command("bench=fidelity", "resume=false", "hydra.run.dir=outputs/y/second", "seed=1")
    assert code == 0 and "calibration: outputs/calibrations" in printed
    (path,) = Path("outputs/calibrations").glob("*.safetensors")
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "model.guidance_scale=3.0")
    assert code == 1 and "guidance_scale was 5.0" in printed and "experiment=calibrate" in printed
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "sampler=flow_match_euler")
    assert code == 1 and "scheduler was" in printed
    code, printed = command(f"calibration.path={path}", "bench=fidelity", "model.height=32")
    assert code == 1 and "size was" in printed
    other = (f"calibration.path={path}", "bench=fidelity", "model.num_inference_steps=5", "cache.steps=3")
    code, printed = command(*other)
    assert code == 1 and "sigmas was" in printed and "experiment=calibrate" in printed
    code, printed = command(*other, "calibration.allow_interpolation=true", "hydra.run.dir=outputs/z/other")
    assert code == 0 and "interpolated from 6 to 5 steps" in printed, printed
    assert json.loads(Path("outputs/z/other/record.json").read_text())["plan_report"]["interpolated_from_steps"] == 6


@pytest.mark.slow
def test_tables_of_rows(command, tmp_path, monkeypatch):
    """Each row is run by its own overrides and compared in pairs; a second call takes up what is there."""
    from experiments import budgets, table3_ablation

    monkeypatch.setattr(budgets, "SHARES", (0.5,))
    monkeypatch.setattr(budgets, "ROWS", budgets.ROWS[:4])
    code, printed = command("experiment=budgets", "bench.num_prompts=2", "calibration.window=5")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    rows = read_lines(folder / "rows.jsonl")
    assert len(rows) == 2 * 5 and {r["row"]: r["forwards"] for r in rows} == {
        "uncached, again": 12, "fewer steps (3)": 6, "plan grid, no cache (3)": 6, "uniform (3)": 6, "policy (3)": 6,
    }  # fmt: skip
    assert rows[0]["psnr_db"] is None and rows[-1]["psnr_db"] > 0
    table = (folder / "table.md").read_text()
    assert "identical" in table and len(table.splitlines()) == 2 + 1 + 5

    monkeypatch.setattr(table3_ablation, "SHARES", (0.5,))
    two = ("policy + longer last step only", "policy + closed-loop rectification")
    monkeypatch.setattr(table3_ablation, "VARIANTS", [row for row in table3_ablation.VARIANTS if row[0] in two])
    monkeypatch.setattr(table3_ablation, "OUTPUT_ONLY", ())
    arguments = ("experiment=table3_ablation", "experiment.seeds=2", "bench.num_prompts=2", "hydra.run.dir=outputs/t/3")
    code, printed = command(*arguments)
    assert code == 0, printed
    record = json.loads(Path("outputs/t/3/record.json").read_text())
    assert len(record["verdicts"]) == 8 and len(record["seeds"]) == len(set(record["seeds"])) == 4
    rows = read_lines(Path("outputs/t/3/rows.jsonl"))
    assert len(rows) == 4 * 6 * 2 and {r["forwards"] for r in rows if "(output" in r["row"]} == {6}
    (at_blocks,) = {round(r["forwards"], 6) for r in rows if "(blocks" in r["row"]}
    assert 6 < at_blocks < 8  # reused steps run embeddings and head there
    by_site = {site: [r["psnr_db"] for r in rows if r["row"] == f"policy ({site}, 3)"] for site in ("output", "blocks")}
    assert by_site["output"] != by_site["blocks"]
    closed = [r["psnr_db"] for r in rows if r["row"] == "policy + closed-loop rectification (output, 3)"]
    assert closed and closed != by_site["output"] and "13.76" in Path("outputs/t/3/table.md").read_text()


@pytest.mark.parametrize(
    ("gains", "said"),
    [([1.0, 1.2, 0.8], "reproduced (+1.00"), ([-1.0, -1.2, -0.8], "contradicted (-1.00"), ([1.0, -1.0, 0.1], "not")],
)
def test_verdicts(gains, said):
    """Mutants: better and worse swapped, the verdicts swapped, an interval that holds zero taken for a result."""
    from experiments.ablation import Results, Row
    from experiments.table3_ablation import CLAIMS, SHARES, verdicts

    def samples(values):
        return [{"psnr_db": value} for value in values]

    rows = {}
    for site in ("output", "blocks"):
        for share in SHARES:
            for label in {label for claim in CLAIMS for label in claim[1:]}:
                rows[Row(label, (), round(share * 6), site).key] = samples([30.0, 20.0, 25.0])
            rows[Row("policy", (), round(share * 6), site).key] = samples([30 + gains[0], 20 + gains[1], 25 + gains[2]])
    lines = verdicts(Results([], 1, rows, {}, []), 6)
    policy = [line for line in lines if line.startswith("the policy helps")]
    assert len(policy) == 4 and all(f": {said}" in line for line in policy), policy
    assert all("not decidable here (+0.00" in line for line in lines if line.startswith("rectification"))


def test_tables_refuse_what_their_rows_decide(command):
    code, printed = command("experiment=budgets", "cache.steps=3")
    assert code == 1 and "cache.steps=3: the rows of this table decide" in printed
    code, printed = command("experiment=table3_ablation", "calibration.path=x.safetensors")
    assert code == 1 and "several calibrations" in printed


def test_decomposition_command(command, tmp_path):
    code, printed = command("experiment=decomposition", "bench.num_prompts=2", "cache=policy")
    assert code == 0 and "injected" in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3) and record["shares"]["grid"] == 0
    assert len(record["propagation_gain"]) == 6 and (folder / "figures" / "decomposition.png").stat().st_size > 5000
    code, printed = command("experiment=decomposition", "cache=none")
    assert code == 1 and "no error to split" in printed


def test_calibrate_command(command, tmp_path):
    code, printed = command("experiment=calibrate")
    assert code == 0 and "what can be planned" in printed and "generations" in printed
    (path,) = tmp_path.glob("outputs/*/*/calibration.safetensors")
    planned = json.loads(path.with_suffix(".json").read_text())["planned"]
    half = next(row for row in planned if row["computed"] == 3)
    assert [value is None for value in half["rectifier_r2_by_step"]].count(True) == 3
    assert half["reuse_error_std"] > 0 and half["break_even_generations"] > 0


def test_shards_of_a_calibration_merge_to_the_whole(command, tmp_path):
    """Mutants: noises that start anew in every shard, shards that overlap, parts of another setup merged."""
    four = ("experiment=calibrate", "calibration.num_prompts=4")

    def made(name: str, *arguments: str) -> Path:
        code, printed = command(*four, f"hydra.run.dir=outputs/{name}", *arguments)
        assert code == 0 and "what can be planned" in printed, printed
        return Path(f"outputs/{name}/calibration.safetensors")

    whole = erta.Calibration.load(made("whole"))
    shards = [made(f"shard{k}", f"calibration.shard={k}/3") for k in (1, 2, 3)]
    merged = erta.Calibration.load(made("merged", f"calibration.parts=[{','.join(map(str, shards))}]"))
    assert merged.record["prompts"] == whole.record["prompts"] and len(whole.record["prompts"]) == 4
    for name, values in merged.statistics.to_arrays().items():
        np.testing.assert_allclose(values, whole.statistics.to_arrays()[name], rtol=1e-9, atol=1e-12, err_msg=name)

    code, printed = command(*four, f"calibration.parts=[{shards[0]},{shards[0]}]")
    assert code == 1 and "already in the parts" in printed
    other = made("other", "calibration.shard=4/4", "model.guidance_scale=3")
    code, printed = command(*four, f"calibration.parts=[{shards[0]},{other}]")
    assert code == 1 and "does not go with" in printed and "guidance_scale" in printed
    for shard in ("0/2", "3/2", "1/9", "half"):
        code, printed = command(*four, f"calibration.shard={shard}")
        assert code == 1 and "calibration.shard must be k/n" in printed
    for elsewhere in ([], ["cache=none"], ["experiment=model_card"]):
        code, printed = command("calibration.shard=1/2", *elsewhere)
        assert code == 1 and "is for experiment=calibrate" in printed
    code, printed = command(*four, "calibration.shard=1/2", f"calibration.parts=[{shards[0]}]")
    assert code == 1 and "at once" in printed


BAD = {
    "unknown group": (["kache=none"], "unknown key kache: did you mean cache?"),
    "unknown choice": (["cache=magic"], "there is no cache=magic. Choose from budcache, dbcache"),
    "unknown key": (["cache.treshold=0.1"], "did you mean cache.threshold?"),
    "added key": (["+cache.treshold=0.1"], "cannot be added"),
    "embedded without weights": (["model.name=mine", "model.path=null"], "experiment=train_tiny model=mine"),
    "unknown site": (["cache.site=middle"], "cache.site must be one of output, blocks"),
    "unknown rectifier": (["cache.rectifier=matrix"], "rectifier must be one of channel, scalar"),
    "velocity at the blocks": (["cache=policy", "cache.site=blocks", "cache.reuse=velocity"], "use site=output"),
    "not a number": (["cache.threshold=abc"], "could not be converted to Float"),
    "negative threshold": (["cache.threshold=-1"], "must be ≥ 0"),
    "two budgets": (["cache.threshold=0.1", "cache.steps=3"], "two budgets"),
    "impossible speed-up": (["cache.speedup=100"], "largest is 6"),
    "speed-up below one": (["cache.speedup=0.5"], "≥ 1"),
    "more steps than exist": (["cache.steps=7"], "between 1 and"),
    "no step": (["cache.steps=0"], "between 1 and"),
    "zero inference steps": (["model.num_inference_steps=0"], "at least 2"),
    "one inference step": (["model.num_inference_steps=1"], "at least 2"),
    "zero prompts": (["bench.num_prompts=0"], "at least 1"),
    "zero calibration prompts": (["calibration.num_prompts=0"], "at least 1"),
    "unknown device type": (["model.dtype=int8"], "one of float32"),
    "unknown dimension": (["bench.dimensions=[beauty]"], "beauty"),
    "threshold without a threshold rule": (["cache=fewer_steps", "cache.threshold=0.1"], "no threshold"),
    "missing calibration": (["calibration.path=nowhere.safetensors"], "cannot read a calibration"),
    "missing folder": (["model.path=nowhere"], "is not a folder"),
    "missing prompt file": (["bench.prompts=nowhere.txt"], "cannot read the prompts"),
    "unknown frames": (["bench.frames_from=gif"], "bench.frames_from must be one of decoded, mp4"),
    "mp4 of images": (["bench.frames_from=mp4", "model.num_frames=null"], "is for videos"),
    "mp4 of odd sizes": (["bench.frames_from=mp4", "model.width=40"], "multiples of 16"),
    "train something else": (["experiment=train_tiny", "model=wan21"], "embedded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_a_line_or_two(command, name):
    arguments, expected = BAD[name]
    code, printed = command(*arguments)
    message = printed[printed.index("error:") :].strip()
    assert code == 1 and expected in message and "Traceback" not in printed
    assert len(message.splitlines()) <= 3, message


def test_word_outside_the_vocabulary_and_bad_prompt_files(command):
    Path("p.txt").write_text("a red zebra moving left\n" * 3)
    code, printed = command("bench.prompts=p.txt")
    assert code == 1 and "'zebra'" in printed and "checkered" in printed
    Path("p.txt").write_text("a red circle\n\na blue star\n")
    assert "line 2 is empty" in command("bench.prompts=p.txt")[1]
    Path("p.txt").write_bytes(b"caf\xe9\n" * 3)
    assert "not UTF-8" in command("bench.prompts=p.txt")[1]
    Path("p.txt").write_text("a red circle\n")
    assert "bench.num_prompts=3, but p.txt holds only 1" in command("bench.prompts=p.txt")[1]


def test_prompts_are_escaped_in_the_report(tmp_path):
    from experiments import report

    rows = [{"prompt": "<script>alert(1)</script>", "seed": 0, "psnr_db": None, "ssim": 1.0, "index": 0}]
    import numpy as np

    for arm in ("uncached", "cached"):
        rows[0][arm] = {"scene": None}
        (tmp_path / "samples" / arm).mkdir(parents=True)
        report.write_animation(np.zeros((2, 16, 16, 3)), tmp_path / "samples" / arm / "000.webp")
    steps = {"computed": 1, "total": 2}
    timing = dict.fromkeys(
        ["denoise_s", "denoise_uncached_s", "pipeline_s", "pipeline_uncached_s", "hook_overhead_per_step_s"], 1.0
    )
    timing |= {"hook_overhead_of_forward": 0.01, "forwards": 2, "forwards_uncached": 4}
    metrics = {"psnr_db": None, "ssim": 1.0, "speedup_denoise": 2.0, "speedup_possible": 2.0, "speedup_pipeline": 1.9}
    names = {"model": {"name": "m"}, "cache": {"name": "c"}, "bench": {"name": "b"}}
    record = {
        "config": names, "steps": steps, "timing": timing, "metrics": metrics, "missing": {}, "seeds": [0],
        "memory": {"cache_bytes": 0, "cache_dtype": ""}, "command": "x", "device": "CPU", "versions": {},
    }  # fmt: skip
    report.write(tmp_path, record, rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


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


def test_output_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, printed = command(f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert code == 1 and "error:" in printed and "Traceback" not in printed


def test_full_disk_keeps_what_was_finished(command, tmp_path, monkeypatch):
    append, calls = main_job.append_line, []

    def full(path, row):
        if calls:
            with open(path, "a") as file:
                file.write('{"index": 1, "pro')  # half a line reaches the disk
            raise OSError(28, "No space left on device", str(path))
        calls.append(1)
        append(path, row)

    monkeypatch.setattr(main_job, "append_line", full)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 1 and "disk is full" in printed
    (folder,) = folders(tmp_path)
    monkeypatch.setattr(main_job, "append_line", append)
    code, printed = command("cache=uniform", "bench=fidelity")
    assert code == 0 and "1 of 3 prompts are done" in printed and folders(tmp_path) == [folder]
    assert [row["index"] for row in read_lines(folder / "per_prompt.jsonl")] == [0, 1, 2]


def test_another_runs_folder_is_left_alone(command, tmp_path):
    assert command("cache=uniform", "bench=fidelity", "hydra.run.dir=out")[0] == 0
    before = (tmp_path / "out" / "record.json").read_text()
    code, printed = command("cache=none", "bench=fidelity", "hydra.run.dir=out")
    assert code == 1 and "holds another run" in printed
    assert (tmp_path / "out" / "record.json").read_text() == before


def test_changed_prompts_do_not_mix_with_finished_rows(command, tmp_path, monkeypatch):
    prompts, append, calls = Path("p.txt"), main_job.append_line, []
    prompts.write_text("a red circle\na blue star\na green box\n")

    def interrupted(path, row):
        append(path, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_job, "append_line", interrupted)
    assert command("cache=uniform", "bench=fidelity", "bench.prompts=p.txt")[0] == 130
    prompts.write_text("a purple circle\na blue star\na green box\n")
    code, printed = command("cache=uniform", "bench=fidelity", "bench.prompts=p.txt")
    assert code == 1 and "prompts changed" in printed and "resume=false" in printed and not calls


def test_sweep_goes_on_after_a_bad_job(command, tmp_path):
    code, printed = command("-m", "cache=uniform", "bench=fidelity", "bench.num_prompts=1", "cache.steps=3,9,2")
    assert code == 1 and "between 1 and" in printed and "Traceback" not in printed
    assert len(list(tmp_path.glob("outputs/*/*/*/record.json"))) == 2
