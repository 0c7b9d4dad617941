"""experiment=compare: one harness for all methods, rows that fail leave the others alone, arithmetic of a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from erta.errors import BudgetError, ErtaError
from experiments import compare
from experiments.harness import comparison
from experiments.output.run_folder import read_lines


def test_comparison_command(command, tmp_path, monkeypatch):
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
    monkeypatch.setattr("experiments.methods.fora.arm", broken)
    monkeypatch.setattr("experiments.methods.t_gate.arm", unreachable)
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


def configured(steps: int = 50, **options):
    return OmegaConf.create(
        {"model": {"num_inference_steps": steps}, "compare": {"quick": False, "methods": [], **options}}
    )


@pytest.mark.parametrize(("steps", "counts"), [(50, (25, 17, 12)), (30, (15, 10, 8))])
def test_every_method_stands_at_every_budget(steps, counts):
    rows = compare.table_rows(configured(steps))
    assert rows[0].label == "none" and rows[1].label == comparison.REFERENCE
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
def test_frames_are_compared_as_asked_for(command):
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
