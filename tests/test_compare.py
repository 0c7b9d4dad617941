"""experiment=compare: one harness for all methods, rows that fail leave the others alone, arithmetic of a row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from erta.errors import BudgetError, ErtaError, ExecutionMismatch
from experiments import compare, compare_sampling, compare_tables, figures, methods
from experiments.ablation import Row
from experiments.prompts import Prompt
from experiments.record import read_lines
from experiments.sampling import Sample
from tests.test_cli import command, folders, weights  # noqa: F401  (fixtures)


def one(psnr: float | None, **changes) -> dict:
    values = {"forwards": 6, "denoise_s": 1.0, "uncached_s": None, "psnr_db": psnr, "ssim": 0.9}
    return {**values, "lpips": None, "scene": True, "cache_bytes": 8, **changes}


def test_comparison_command(command, tmp_path, monkeypatch):  # noqa: F811
    """Mutants: a failure that ends the run, or that exits with 0; a row that hides its reason; tables of what is
    finished that sample more, forget why a row was left out, or delete the rows of a finished run.
    """
    caches = tmp_path / "caches"
    caches.mkdir()
    for name in ("none", "ertacache", "uniform", "fora", "t_gate"):
        (caches / f"{name}.yaml").touch()

    def broken(*_):
        raise RuntimeError("a peer broke\nsecond line")

    def unreachable(*_):
        raise BudgetError("cache=t_gate reaches 4 to 6 steps")

    monkeypatch.setattr(compare, "CACHES", caches)
    monkeypatch.setattr("experiments.peers.fora.arm", broken)
    monkeypatch.setattr("experiments.peers.t_gate.arm", unreachable)
    monkeypatch.setattr(compare, "QUICK_PROMPTS", 2)
    arguments = ("experiment=compare", "compare.quick=true", "calibration.window=5", "hydra.run.dir=outputs/c")
    arguments += ("compare.workers=1",)  # what is patched here is not patched in other processes
    code, printed = command(*arguments)
    assert code == 1 and "failed inside the pipeline: fora (3)" in printed, printed
    record = json.loads(Path("outputs/c/record.json").read_text())
    assert record["not_run"] == {
        "fora (3)": "RuntimeError: a peer broke", "t_gate (3)": "cache=t_gate reaches 4 to 6 steps",
    }  # fmt: skip
    rows = read_lines(Path("outputs/c/rows.jsonl"))
    assert [(r["row"], r["forwards"]) for r in rows] == [
        ("none", 12), ("none", 12), ("ertacache (3)", 6), ("ertacache (3)", 6), ("uniform (3)", 6), ("uniform (3)", 6),
    ]  # fmt: skip
    assert all(r["uncached_s"] > 0 for r in rows) and rows[0]["psnr_db"] is None and rows[2]["psnr_db"] > 0
    tables = Path("outputs/c/comparison.md").read_text()
    assert "| uncached | 12.0 | 1.00x | reference |" in tables
    assert "identical" in tables and "- fora: RuntimeError: a peer broke" in tables and "## 3 computed steps" in tables
    assert "not run" in printed and "| fora |" not in tables
    for axis in ("speedup", "forwards"):
        assert Path(f"outputs/c/figures/psnr_by_{axis}.png").stat().st_size > 5000
    for path in ("rows.jsonl", "state.json"):  # as if interrupted at the last row
        lines = Path("outputs/c", path).read_text().replace('"finished": true', '"finished": false').splitlines(True)
        Path("outputs/c", path).write_text("".join(lines[:-1] if path == "rows.jsonl" else lines))
    code, printed = command(*arguments, "compare.only_finished=true")
    assert code == 0 and "uniform (3) is left out: not finished: 1 of 2 prompts" in printed, printed
    assert "fora (3) is left out: RuntimeError: a peer broke" in printed
    assert len(read_lines(Path("outputs/c/rows.jsonl"))) == 5
    assert "- uniform: not finished" in Path("outputs/c/comparison.md").read_text()
    code, printed = command(*arguments)
    assert code == 1 and len(read_lines(Path("outputs/c/rows.jsonl"))) == 6
    code, printed = command(*arguments, "compare.only_finished=true")
    assert code == 0 and len(read_lines(Path("outputs/c/rows.jsonl"))) == 6 and "not finished" not in printed
    code, printed = command("experiment=compare", "cache.steps=3")
    assert code == 1 and "decide about the cache" in printed


def test_what_breaks_in_the_pipeline_is_a_failure(monkeypatch):
    """A method that refuses is left out, also one that breaks with an error of ours fails. Mutant: both left out."""
    refusing = {"t_gate"}

    class Arms:
        def __init__(self, pipe):
            pass

        def build(self, row):
            if row.label in refusing:
                raise BudgetError("no such budget")
            return methods.Arm(None, {})

    def breaks(*_):
        raise ExecutionMismatch("two of three steps")

    monkeypatch.setattr(compare_sampling, "RowArms", Arms)
    monkeypatch.setattr(compare_sampling, "measurer", lambda *_: breaks)
    sample = compare_sampling.sampler(None, None, [], "CPU", pipe=object())
    events = list(sample([(Row("t_gate", (), 3), (0, 1)), (Row("fora", (), 3), (0, 1))]))
    assert [(event.row, event.kind) for event in events] == [
        ("t_gate (3)", "is left out"), ("fora (3)", "set up"), ("fora (3)", "failed"),
    ]  # fmt: skip
    assert events[0].about["reason"] == "no such budget" and "two of three steps" in events[2].about["reason"]


def test_uncached_runs_are_timed_in_turns(monkeypatch):
    """A warm-up, then in turns. Mutants: no warm-up, the uncached run always first, or timed on every prompt."""
    order = []

    def generate(pipe, text, seed, kwargs, put_on=None):
        order.append("uncached" if put_on is None else "cached")
        return Sample(np.zeros((1, 16, 16, 3), np.float32), float(len(order)), 1.0, 1.0, 6)

    monkeypatch.setattr(compare_sampling, "generate", generate)
    monkeypatch.setattr(compare_sampling, "uncached_clips", lambda *_: [np.ones((1, 16, 16, 3), np.float32)] * 9)
    cfg = OmegaConf.create({"compare": {"quick": True}, "bench": {"frames_from": "decoded"}})
    monkeypatch.setattr(compare_sampling, "call_kwargs", lambda cfg: {})
    measure = compare_sampling.measurer(cfg, None, None, [Prompt("a circle", 0, id="0")] * 9)
    assert order == ["uncached"]
    order.clear()
    lines = [measure(methods.Arm(None, {}), index) for index in (0, 1, compare_sampling.QUICK_TIMED)]
    assert order == ["uncached", "cached", "cached", "uncached", "cached"]
    assert [(line["denoise_s"], line["uncached_s"]) for line in lines] == [(2.0, 1.0), (3.0, 4.0), (5.0, None)]


def test_a_row_of_the_table():
    """Mutants: unpaired differences, the speed-up of other samples than the timed ones, means over what is missing."""
    reference = compare_tables.Outcome(Row("ertacache", (), 3), [one(30.0), one(40.0)])
    timed = [one(33.0, denoise_s=1.0, uncached_s=2.0), one(43.0, denoise_s=9.0)]
    outcome = compare_tables.Outcome(Row("uniform", (), 3), timed, calibration_s=1.5)
    assert outcome.speedup == 2.0
    cells = dict(zip(compare_tables.COLUMNS, compare_tables.cells(outcome, reference, 12), strict=True))
    assert cells["PSNR dB"] == "38.00" and cells["against ertacache (95 %)"] == "+3.00 [+3.00, +3.00]"
    assert cells["speed-up, measured"] == "2.00x" and cells["LPIPS"] == "" and cells["scene, all"] == "100.0%"
    assert compare_tables.cells(reference, reference, 12)[4] == "" and cells["calibration s"] == "2"
    point = compare_tables.point(outcome, reference)
    assert point["against_ertacache"]["psnr_db"] == [3, 3, 3] and point["against_ertacache"]["scene"] == [0, 0, 0]
    assert "lpips" not in point["against_ertacache"] and point["calibration_s"] == 1.5


def test_all_differences_are_paired():
    """Ratios of 2 and 4 against 1 and 2 where both were timed: +1 and +2; the third was timed on one side alone.

    Mutants: the difference of the medians over all timed prompts, medians for means, the reference among the rows.
    """
    reference = compare_tables.Outcome(
        Row("ertacache", (), 3),
        [one(30.0, uncached_s=1.0), one(40.0, uncached_s=2.0), one(50.0, uncached_s=90.0)],
    )
    row = compare_tables.Outcome(
        Row("uniform", (), 3),
        [one(31.0, ssim=0.8, uncached_s=2.0), one(42.0, ssim=0.7, uncached_s=4.0, scene=False), one(53.0, ssim=0.6)],
    )
    idle = compare_tables.Outcome(Row("fora", (), 3), [one(None, forwards=12)] * 3)
    whole = compare_tables.Outcome(Row("none", (), None), [one(None, forwards=12)] * 3)
    (line,) = compare_tables.differences([whole, reference, row, idle], 3)
    cells = dict(zip(compare_tables.DIFFERENCES, line, strict=True))
    assert cells["method"] == "uniform" and cells["PSNR dB"].startswith("+2.00 [+1.") and cells["LPIPS"] == ""
    assert cells["SSIM"].startswith("-0.2000 [-0.") and cells["scene, all"].startswith("-33.3%")
    assert cells["speed-up"] == "+1.50 [+1.00, +2.00]"
    assert compare_tables.differences([whole, row], 3) == []
    pair = [reference, row]
    paired = {3: compare_tables.differences(pair, 3)}
    text = compare_tables.as_markdown("m", compare_tables.tabulate(pair), paired, pair)
    assert "Against ertacache:" in text and "+1.50 [+1.00, +2.00]" in text


def test_a_cache_that_computed_everything_says_so():
    """Mutants: such a row ranked by its perfect PSNR; a plan's grid without a cache, which computes all of fewer steps."""
    idle = compare_tables.Outcome(Row("taylorseer", (), 3), [one(None, forwards=12)])
    assert compare_tables.cells(idle, None, 12)[1] == "did not reuse anything"
    assert compare_tables.cells(compare_tables.Outcome(Row("plan_grid", (), 3), [one(40.0)]), None, 12)[1] == "6.0"
    whole = compare_tables.Outcome(Row("none", (), None), [one(None, forwards=12)])
    table = compare_tables.tabulate([whole, compare_tables.Outcome(Row("fora", (), 3), [one(40.0)])], 0.75)[3]
    assert [line[0] for line in table] == ["uncached", "none: uncached again", "fora"] and table[0][7] == "75.0%"
    assert compare_tables.cells(whole, None, 12)[3] == "identical" and compare_tables.full_forwards([idle, whole]) == 12


def configured(steps: int = 50, **options):
    return OmegaConf.create(
        {"model": {"num_inference_steps": steps}, "compare": {"quick": False, "methods": [], **options}}
    )


@pytest.mark.parametrize(("steps", "counts"), [(50, (25, 17, 12)), (30, (15, 10, 8))])
def test_every_method_stands_at_every_budget(steps, counts):
    rows = compare.table_rows(configured(steps))
    assert rows[0].label == "none" and rows[1].label == compare_tables.REFERENCE
    assert {row.computed for row in rows[1:]} == set(counts)
    grids = [row for row in rows if row.label.startswith("plan_grid of ")]
    assert {row.overrides for row in grids} >= {("cache=plan_grid", "cache.options.of=lemica")}
    bare = [row for row in rows if row.label.endswith(", no warm-up")]
    assert len(bare) == 3 * len(compare.NO_WARMUP)
    assert ("cache=dicache", "cache.options.retention=0") in {row.overrides for row in bare}
    assert len(rows) == 1 + 3 * (len(list(compare.CACHES.glob("*.yaml"))) - 1) + len(grids) + len(bare)
    assert len({row.key for row in rows}) == len(rows) and len(grids) == 3 * len(compare.GRIDS)


def test_methods_can_be_chosen():
    quick = compare.table_rows(configured(quick=True))
    assert all("calibration.knob_prompts=1" in row.overrides for row in quick[1:])
    assert {row.computed for row in quick[1:]} == {25} and not {row.label for row in quick} & set(compare.SEARCHED)
    assert not any("no warm-up" in row.label for row in quick)
    some = compare.table_rows(configured(methods=["dicache"]))
    assert [row.label for row in some[1:3]] == ["dicache", "dicache, no warm-up"]
    few = compare.table_rows(configured(methods=["uniform", "ertacache"]))
    assert [row.label for row in few[:3]] == ["none", "ertacache", "uniform"] and len(few) == 1 + 3 * 2
    with pytest.raises(ErtaError, match="there is no teecache"):
        compare.table_rows(configured(methods=["teecache"]))


@pytest.mark.slow
def test_frames_are_compared_as_asked_for(command):  # noqa: F811
    """Mutant: bench.frames_from ignored."""
    found = {}
    for source in ("decoded", "mp4"):
        arguments = [
            "compare.methods=[uniform]",
            "compare.quick=true",
            "compare.workers=1",
            f"bench.frames_from={source}",
        ]
        code, printed = command(
            "experiment=compare", *arguments, "bench.num_prompts=1", f"hydra.run.dir=outputs/{source}"
        )
        assert code == 0 and ("read from mp4 files" in printed) == (source == "mp4"), printed
        found[source] = [row["psnr_db"] for row in read_lines(Path(f"outputs/{source}/rows.jsonl"))]
    assert found["decoded"][0] is found["mp4"][0] is None and found["decoded"][1] != found["mp4"][1]


def test_labels_of_the_figures_are_kept_apart():
    """Mutants: labels on top of each other, in another order, or pushed out of the panel."""
    made = figures._spread([0.1, 0.11, 0.11, 0.9, 0.99, 0.99, 1.0], apart=0.1)
    assert made == pytest.approx([0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0])
