"""Two ranks make what one process makes: rows and calibration bit for bit, sums of features to 1e-12."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.output import ranks
from experiments.output.files import append_line, read_lines
from tests.commands import QUICK
from tests.soak import ROOT, essence

SUMS = """
import sys, torch
from torchmetrics.image.fid import FrechetInceptionDistance
from experiments.bench import images
from experiments.output import ranks

class Features(torch.nn.Module):
    num_features = 6
    def forward(self, x):
        return x.double().flatten(1)[:, :6] / 255

rng = torch.Generator().manual_seed(0)
sets = [torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng) for n in (37, 41)]
with ranks.together():
    metric = FrechetInceptionDistance(feature=Features(), sync_on_compute=False)
    for side, one in zip(("real", "fake"), sets):
        images._look_at(metric, one, side)
    sums = torch.cat([metric.real_features_sum, metric.real_features_cov_sum.flatten(), metric.fake_features_sum,
                      metric.real_features_num_samples[None].double(), metric.compute()[None].double()])
    if ranks.is_first():
        torch.save(sums, sys.argv[1])
"""


def run(folder: Path, *arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """A command under torchrun, or without it."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--log-dir", str(folder / "log")]
    command = [sys.executable, *(launch if count > 1 else []), *arguments]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
def test_two_ranks_make_what_one_process_makes(tmp_path, weights):
    """Also when a rank died before: its finished lines are there. Mutants: a prompt made by both ranks; an order of merging that
    depends on who was first.
    """
    job = [*QUICK, f"model.path={weights}", "bench=fidelity", "bench.num_prompts=5", "hydra.run.dir=out"]
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        made = run(folder, str(ROOT / "run.py"), *job, count=count)
        assert made.returncode == 0, made.stdout + made.stderr
        found[count] = folder
    rows = {
        n: sorted(read_lines(at / "out" / "per_prompt.jsonl"), key=lambda row: row["index"]) for n, at in found.items()
    }
    assert essence(rows[1]) == essence(rows[2]) and len(rows[2]) == 5
    records = {n: essence(json.loads((at / "out" / "record.json").read_text())) for n, at in found.items()}
    assert records[1] == records[2]
    plans = {n: json.loads((at / "out" / "plan.json").read_text()) for n, at in found.items()}
    assert plans[1] == plans[2] and not list((found[2] / "out").glob("*rank*"))
    # a rank that died left a line in its own file; the record was not written
    state = found[2] / "out" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    kept = rows[2]
    (found[2] / "out" / "per_prompt.jsonl").unlink()
    append_line(found[2] / "out" / "per_prompt.rank1.jsonl", kept[3])
    (found[2] / "out" / "record.json").unlink()
    again = run(found[2], str(ROOT / "run.py"), *job)
    assert again.returncode == 0 and "1 of 5 prompts are done" in again.stdout, again.stdout + again.stderr
    whole = sorted(read_lines(found[2] / "out" / "per_prompt.jsonl"), key=lambda row: row["index"])
    assert essence(whole) == essence(kept) and whole[3] == kept[3]


@pytest.mark.slow
def test_a_table_of_two_ranks_is_the_serial_one(tmp_path, weights):
    """Rows bit for bit, each sample once, and the table's text. Mutants: a row that both ranks make; a rank's own calibration;
    references of one rank missing at the other.
    """
    job = [*QUICK, f"model.path={weights}", "experiment=compare", "compare.methods=[ertacache,uniform,fewer_steps]"]
    job += ["compare.quick=true", "compare.timed=1", "compare.workers=1", "bench.num_prompts=3", "hydra.run.dir=out"]
    found, tables = {}, {}
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        made = run(tmp_path / str(count), str(ROOT / "run.py"), *job, count=count)
        assert made.returncode == 0, made.stdout + made.stderr
        out = tmp_path / str(count) / "out"
        found[count] = sorted(read_lines(out / "rows.jsonl"), key=lambda line: (line["row"], line["index"]))
        tables[count] = json.loads((out / "record.json").read_text())["rows"]
        assert not list(out.glob("*rank*"))
    keys = [(line["row"], line["index"]) for line in found[2]]
    assert len(set(keys)) == len(keys) == 3 * len({row for row, _ in keys}) and len({row for row, _ in keys}) >= 4
    assert essence(found[1]) == essence(found[2]) and tables[1] == tables[2]


@pytest.mark.slow
def test_sums_of_features_over_ranks(tmp_path):
    """Mutant: each rank's mean in place of the sum."""
    (tmp_path / "sums.py").write_text(SUMS)
    for count in (1, 2):
        made = run(tmp_path, "sums.py", f"{count}.pt", count=count)
        assert made.returncode == 0, made.stderr
    one, two = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    torch.testing.assert_close(one[:-1], two[:-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(one[-1:], two[-1:], rtol=1e-6, atol=0)  # FID itself: a square root of a matrix


def test_what_ranks_wrote_is_merged_once(tmp_path):
    """The first rank died after merging and before taking the files away. Mutant: lines twice."""
    for index in (0, 2):
        append_line(tmp_path / "rows.jsonl", {"index": index})
    for index in (1, 2):
        append_line(tmp_path / "rows.rank1.jsonl", {"index": index})
    ranks.merge_lines(tmp_path / "rows.jsonl")
    assert [line["index"] for line in read_lines(tmp_path / "rows.jsonl")] == [0, 2, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_without_torchrun_there_is_one_rank():
    assert (
        ranks.count() == 1 and ranks.is_first() and ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.same(lambda: 4) == 4
    )
