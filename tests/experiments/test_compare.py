"""experiment=compare: one harness for all methods, rows that fail leave the others alone, arithmetic of a row."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from analysis import records, tables
from erta.errors import BudgetError, ErtaError
from experiments import compare
from experiments.harness import catalogue
from experiments.output.files import read_lines


@pytest.mark.slow
def test_comparison_command(command, tmp_path, monkeypatch):
    """Mutants: a failure that ends the run, or that exits with 0; a row that hides its reason; tables of unfinished rows
    that sample, or forget why a row was left out.
    """
    caches = tmp_path / "caches"
    caches.mkdir()
    for name in ("none", "ertacache", "uniform", "fora", "t_gate"):
        shutil.copy(catalogue.FOLDER / f"{name}.yaml", caches)

    def broken(*_):
        raise RuntimeError("a method broke\nsecond line")

    def unreachable(*_):
        raise BudgetError("cache=t_gate reaches 4 to 6 steps")

    monkeypatch.setattr(catalogue, "FOLDER", caches)
    monkeypatch.setattr("experiments.methods.fora.arm", broken)
    monkeypatch.setattr("experiments.methods.t_gate.arm", unreachable)
    monkeypatch.setattr(compare, "QUICK_PROMPTS", 2)
    arguments = ("experiment=compare", "compare.quick=true", "calibration.window=5", "hydra.run.dir=outputs/c")
    arguments += ("compare.workers=1",)  # what is patched here is not patched in other processes
    code, printed = command(*arguments)
    assert code == 1 and "failed inside the pipeline: fora (3)" in printed, printed
    kept = records.read_rows("outputs/c")
    assert kept.left_out == {
        "fora (3)": "RuntimeError: a method broke", "t_gate (3)": "cache=t_gate reaches 4 to 6 steps",
    }  # fmt: skip
    rows = kept.samples
    assert [(r.row, r.forwards) for r in rows] == [
        ("none", 12), ("none", 12), ("ertacache (3)", 6), ("ertacache (3)", 6), ("uniform (3)", 6), ("uniform (3)", 6),
    ]  # fmt: skip
    assert all(r.uncached_s > 0 for r in rows) and rows[0].psnr_db is None and rows[2].psnr_db > 0
    text = Path("outputs/c/table.md").read_text()
    assert "| uncached | 12 | 1.00x | reference |" in text and "| uncached, again | 12 |" in text
    assert "- FORA: RuntimeError: a method broke" in text and "## 3 of 6 steps" in text
    assert "not run" in printed and "| FORA |" not in text
    for name in ("methods", "pareto"):
        assert Path(f"outputs/c/figures/{name}.png").stat().st_size > 5000
    for path in ("rows.jsonl", "state.json"):  # as if interrupted at the last row
        lines = Path("outputs/c", path).read_text().replace('"finished": true', '"finished": false').splitlines(True)
        Path("outputs/c", path).write_text("".join(lines[:-1] if path == "rows.jsonl" else lines))
    assert tables.main(["outputs/c"]) == 0 and len(read_lines(Path("outputs/c/rows.jsonl"))) == 5
    unfinished = Path("outputs/c/table.md").read_text()
    assert "- uniform reuse: not finished: 1 of 2 samples" in unfinished and "- FORA: RuntimeError" in unfinished
    code, printed = command(*arguments)
    assert code == 1 and len(read_lines(Path("outputs/c/rows.jsonl"))) == 6
    assert "not finished" not in Path("outputs/c/table.md").read_text()


def configured(steps: int = 50, **options):
    keys = {
        "quick": False,
        "methods": [],
        "budgets": [],
        "oracles": False,
        "worst": 0,
        "reference": "ertacache",
        **options,
    }
    return OmegaConf.create({"model": {"num_inference_steps": steps}, "compare": keys})


ORACLES = {"ertaplan_oracle", "ertaplan_oracle_nodes"}
FACTS = {name: catalogue.facts(name) for name in catalogue.names()}


@pytest.mark.parametrize(("steps", "counts"), [(50, (25, 17, 12)), (30, (15, 10, 8))])
def test_every_method_stands_at_every_budget(steps, counts):
    """The grids are those that are no other's; the methods with a warm-up stand a second time without."""
    rows = compare.table_rows(configured(steps))
    assert rows[0].label == "none" and rows[0].computed is None and rows[1].label == "ertacache"
    assert {row.computed for row in rows[1:]} == set(counts)
    grids = [row for row in rows if row.label.startswith("plan_grid of ")]
    assert {row.searches for row in grids} == {"uniform", "lemica", "gcache", "budcache", "meancache", "ertaplan"}
    assert {row.options for row in grids} >= {("cache.options.of=lemica",)}
    bare = [row for row in rows if row.label.endswith(", no warm-up")]
    assert {row.method for row in bare} == {
        "dbcache", "dbcache_taylor", "dicache", "easycache", "magcache", "sencache",
    }  # fmt: skip
    assert ("cache.options.retention=0",) in {row.options for row in bare}
    assert ("cache.options.first=null",) in {row.options for row in bare}
    assert len(rows) == 1 + 3 * (len(FACTS) - 1 - len(ORACLES)) + len(grids) + len(bare)
    assert len({row.key for row in rows}) == len(rows)
    titles = {row.label: row.title for row in rows}
    assert (
        titles["plan_grid"] == "plan grid of ERTACache's policy"
        and titles["plan_grid of lemica"] == "plan grid of LeMiCa"
    )


def test_methods_can_be_chosen():
    """Mutants: slow searches in a quick comparison, rows without a warm-up there, an unknown method passed over."""
    quick = compare.table_rows(configured(quick=True))
    assert all("calibration.knob_prompts=1" in row.options for row in quick[1:])
    slow = {name for name, about in FACTS.items() if about.slow_search}
    assert slow == {"budcache", "lemica", "oss", *ORACLES} and not {row.label for row in quick} & slow
    assert {row.computed for row in quick[1:]} == {25} and not any("no warm-up" in row.label for row in quick)
    some = compare.table_rows(configured(methods=["dicache"]))
    assert [row.label for row in some[1:3]] == ["dicache", "dicache, no warm-up"]
    few = compare.table_rows(configured(methods=["uniform", "ertacache"]))
    assert [row.label for row in few[:3]] == ["none", "ertacache", "uniform"] and len(few) == 1 + 3 * 2
    first = compare.table_rows(configured(methods=["uniform", "ertacache"], reference="uniform"))
    assert [row.label for row in first[:3]] == ["none", "uniform", "ertacache"]
    with pytest.raises(ErtaError, match=r"compare\.methods: there is no teecache"):
        compare.table_rows(configured(methods=["teecache"]))
    with pytest.raises(ErtaError, match=r"compare\.reference: there is no none"):
        compare.table_rows(configured(reference="none"))


def test_oracles_and_budgets_are_asked_for():
    """Mutants: an oracle without being asked, one without its name, OSS among them, budgets twice or in a quick table's place."""
    assert not {row.label for row in compare.table_rows(configured())} & ORACLES
    for asked in ({"oracles": True, "methods": ["oss"]}, {"methods": ["oss", *sorted(ORACLES)]}):
        rows = compare.table_rows(configured(**asked))[1:]
        assert {row.label for row in rows} == {"oss", *ORACLES} and len(rows) == 9
        assert [row.record().group for row in rows[:3]] == ["none", "oracle", "oracle"]
        assert ["(oracle)" in row.record().title for row in rows[:3]] == [False, True, True]
    chosen = compare.table_rows(configured(budgets=[25, 17, 12, 8, 8], methods=["uniform"], quick=True))
    assert [row.computed for row in chosen] == [None, 25, 17, 12, 8]
    with pytest.raises(BudgetError, match=r"compare\.budgets: 51 computed steps of 50"):
        compare.table_rows(configured(budgets=[8, 51]))


@pytest.mark.slow
def test_the_worst_samples_are_kept(command, tmp_path):
    """Of the reference at each budget; they are the row's own samples. Mutants: those of another row, the best ones, samples that
    are made again by the same command."""
    arguments = (
        "experiment=compare",
        "compare.methods=[uniform,ertacache]",
        "compare.budgets=[3,4]",
        "compare.worst=1",
    )
    arguments += ("compare.workers=1", "compare.timed=1", "calibration.window=5", "hydra.run.dir=outputs/w")
    code, printed = command(*arguments)
    assert code == 0, printed
    rows = records.read_rows("outputs/w")
    kept = sorted(path.relative_to("outputs/w/worst").as_posix() for path in Path("outputs/w/worst").rglob("*.webp"))
    wanted = []
    for count in (3, 4):
        of_row = {one.index: one.psnr_db for one in rows.samples if one.row == f"ertacache ({count})"}
        worst = min(of_row, key=of_row.get)
        wanted += [f"ertacache_{count}/{worst:03d}_{side}.webp" for side in ("made", "uncached")]
        assert Path(f"outputs/w/figures/worst_ertacache_{count}.png").stat().st_size > 5000
    assert kept == wanted
    assert "against uncached (95 %)" in Path("outputs/w/table.md").read_text()


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
