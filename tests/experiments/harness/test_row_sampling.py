"""The engine of rows: sampled, timed in turns, resumed; what refuses is left out, what breaks fails."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from erta.errors import BudgetError, ExecutionMismatch
from experiments.harness import arm, row_sampling
from experiments.harness.generate import Sample
from experiments.harness.rows import Row
from experiments.output.files import read_lines
from experiments.prompts.choose import Prompt
from tests.commands import folders


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
    assert "## 3 of 6 steps" in table and "| uncached, again | 12 |" in table and "identical" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == (1 + 1 + 5) + (1 + 3)

    monkeypatch.setattr(table3_ablation, "SHARES", (0.5,))
    two = ("policy + longer last step only", "policy + closed-loop rectification")
    monkeypatch.setattr(table3_ablation, "VARIANTS", [row for row in table3_ablation.VARIANTS if row[0] in two])
    monkeypatch.setattr(table3_ablation, "OUTPUT_ONLY", ())
    arguments = (
        "experiment=table3_ablation",
        "table3_ablation.seeds=2",
        "bench.num_prompts=2",
        "hydra.run.dir=outputs/t/3",
    )
    code, printed = command(*arguments)
    assert code == 0, printed
    record = json.loads(Path("outputs/t/3/record.json").read_text())
    assert len(record["rows"]) == 1 + 2 * 6 and len(record["seeds"]) == len(set(record["seeds"])) == 4
    assert record["kind"] == "rows" and record["noises"] == 2 and all(scene for scene in record["uncached_scene"])
    text = Path("outputs/t/3/table.md").read_text()
    for place in ("output, 3 of 6 steps", "blocks, 3 of 6 steps"):
        assert f"| the policy helps ({place}) | 22.09 against 13.76 (+8.33) | " in text
        assert f"| rectification helps ({place}) | 23.77 against 22.94 (+0.83) | " in text
    assert "verdict" in printed
    rows = read_lines(Path("outputs/t/3/rows.jsonl"))
    assert len(rows) == 4 * (1 + 6 * 2) and {r["forwards"] for r in rows if "(output" in r["row"]} == {6}
    (at_blocks,) = {round(r["forwards"], 6) for r in rows if "(blocks" in r["row"]}
    assert 6 < at_blocks < 8  # reused steps run embeddings and head there
    by_site = {site: [r["psnr_db"] for r in rows if r["row"] == f"policy ({site}, 3)"] for site in ("output", "blocks")}
    assert by_site["output"] != by_site["blocks"]
    closed = [r["psnr_db"] for r in rows if r["row"] == "policy + closed-loop rectification (output, 3)"]
    assert closed and closed != by_site["output"] and "| paper: PSNR dB |" in text


def test_tables_refuse_what_their_rows_decide(command):
    code, printed = command("experiment=budgets", "cache.steps=3")
    assert code == 1 and "cache.steps=3: the rows of this table decide about the cache; leave it out" in printed
    code, printed = command("experiment=table3_ablation", "calibration.path=x.safetensors")
    assert code == 1 and "several calibrations" in printed


def work(prompts: int) -> row_sampling.Work:
    cfg = OmegaConf.create({"bench": {"frames_from": "decoded"}})
    return row_sampling.Work(cfg, Path(), [Prompt("a circle", 0, id="0")] * prompts, timed=2)


class Stand:
    """Stands in for a run's set-up."""

    pipe, grid = None, SimpleNamespace(sigmas=np.array([1.0, 0.5, 0.0]))

    def __init__(self, cfg=None):
        self.cfg, self.kwargs = cfg, {"num_inference_steps": 2}

    def with_cache(self, cfg):
        return Stand(cfg)


def test_what_breaks_in_the_pipeline_is_a_failure(monkeypatch):
    """A method that refuses is left out, also one that breaks with an error of ours fails. Mutant: both left out."""

    def make_arm(setup):
        if setup.cfg.label == "t_gate":
            raise BudgetError("no such budget")
        return arm.Arm(None, setup.kwargs, report={"knob": 3})

    def breaks(*_):
        raise ExecutionMismatch("two of three steps")

    monkeypatch.setattr(row_sampling, "compose_row", lambda row: row)
    monkeypatch.setattr(row_sampling, "make_arm", make_arm)
    monkeypatch.setattr(row_sampling, "measurer", lambda *_: breaks)
    sample = row_sampling.sampler(work(2), Stand())
    rows = [Row("t_gate", "t_gate", (), 3), Row("fora", "fora", (), 3)]
    events = list(sample([(row, (0, 1)) for row in rows]))
    assert [(event.row, event.kind) for event in events] == [
        ("t_gate (3)", "is left out"), ("fora (3)", "set up"), ("fora (3)", "failed"),
    ]  # fmt: skip
    assert events[0].about["reason"] == "no such budget" and "two of three steps" in events[2].about["reason"]
    assert events[1].about["last_sigma"] == 0.5 and events[1].about["report"] == {"knob": 3}


def test_uncached_runs_are_timed_in_turns(monkeypatch):
    """A warm-up, then in turns. Mutants: no warm-up, the uncached run always first, or timed on every prompt."""
    order = []

    def generate(pipe, text, seed, kwargs, put_on):
        order.append("uncached" if "cached" not in kwargs else "cached")
        return Sample(np.zeros((1, 16, 16, 3), np.float32), float(len(order)), 1.0, 1.0, 6)

    monkeypatch.setattr(arm, "generate", generate)
    monkeypatch.setattr(row_sampling, "uncached_samples", lambda *_: [np.ones((1, 16, 16, 3), np.float32)] * 9)
    measure = row_sampling.measurer(work(9), Stand())
    assert order == ["uncached"]
    order.clear()
    row = Row("fora", "fora", (), 3)
    samples = [measure(row, arm.Arm(None, {"cached": True}), index) for index in (0, 1, 2)]
    assert order == ["uncached", "cached", "cached", "uncached", "cached"]
    assert [(one.denoise_s, one.uncached_s) for one in samples] == [(2.0, 1.0), (3.0, 4.0), (5.0, None)]
    assert {one.row for one in samples} == {"fora (3)"}


def test_rows_that_share_a_search_stay_together(tmp_path):
    """Mutants: a grid in another process than the method whose search it uses; the short pieces first."""
    rows = [
        Row("lemica", "lemica", (), 3),
        Row("fora", "fora", (), 3),
        Row("grid", "plan_grid", (), 3, searches="lemica"),
    ]
    (tmp_path / "rows.jsonl").write_text('{"row": "fora (3)", "index": 0}\n')
    pieces = row_sampling.Samples(tmp_path, rows, 2).pieces()
    assert [[(row.label, missing) for row, missing in piece] for piece in pieces] == [
        [("lemica", (0, 1)), ("grid", (0, 1))], [("fora", (1,))],
    ]  # fmt: skip
