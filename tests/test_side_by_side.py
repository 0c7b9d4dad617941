"""Work that processes share: nothing lost, nothing hung, the same results as one process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from erta.errors import ErtaError
from experiments import side_by_side
from experiments.record import read_lines
from experiments.side_by_side import Event, do_all, share_cores
from tests.test_cli import command, weights  # noqa: F401  (fixtures)


def squares(power: int):
    def work(piece: int):
        if piece == -1:
            raise RuntimeError("broken\nsecond line")
        if piece == -9:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Event("power", str(piece), {"value": piece**power, "pid": os.getpid()})

    return work


@pytest.fixture
def threads():
    """Two cores, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_cores_are_shared(threads, monkeypatch):
    """Mutants: every process with all threads; as many processes on a GPU as there are cores."""
    with pytest.raises(ErtaError, match=r"compare.workers=3: there are 2 CPU cores"):
        share_cores(3)
    assert share_cores(1) == 1 and torch.get_num_threads() == 2
    assert share_cores(None) == 2 and torch.get_num_threads() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.set_num_threads(2)
    assert share_cores(None) == 1


def test_one_worker_is_this_process():
    assert [e.about for e in do_all(1, [2, 3], squares, 2)] == [
        {"value": value, "pid": os.getpid()} for value in (4, 9)
    ]  # fmt: skip
    assert list(do_all(2, [], squares, 2)) == []


@pytest.mark.slow
def test_every_piece_is_done_once_and_elsewhere():
    """Mutants: a worker that stops at the first piece; an end that does not wait for the last events."""
    events = list(do_all(2, list(range(20)), squares, 3))
    assert sorted(e.about["value"] for e in events) == [n**3 for n in range(20)]
    assert os.getpid() not in {e.about["pid"] for e in events}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("piece", "message"),
    [(-1, r"RuntimeError: broken \(compare.workers=1"), (-9, r"code -9, perhaps for want of memory")],
)
def test_a_process_that_fails_ends_the_run(piece, message, monkeypatch):
    """Mutants: a run that waits for a dead process for ever, or ends as if all were done."""
    monkeypatch.setattr(side_by_side, "LOOK_AFTER_S", 0.5)
    with pytest.raises(ErtaError, match=message):
        list(do_all(2, [1, piece, *range(5)], squares, 2))


@pytest.mark.slow
def test_comparison_in_two_processes(command, threads):  # noqa: F811
    """The rows of two processes are those of one. Mutant: processes that do not get the command line's overrides."""
    arguments = (
        "experiment=compare",
        "compare.methods=[ertacache,uniform]",
        "compare.quick=true",
        "bench.num_prompts=2",
    )
    found = {}
    for workers in (1, 2):
        torch.set_num_threads(2)
        folder = f"outputs/{workers}"
        code, printed = command(*arguments, f"compare.workers={workers}", f"hydra.run.dir={folder}")
        assert code == 0, printed
        rows = read_lines(Path(folder, "rows.jsonl"))
        found[workers] = {(row["row"], row["index"]): row["psnr_db"] for row in rows}
    assert set(found[1]) == {(name, k) for name in ("none", "ertacache (3)", "uniform (3)") for k in (0, 1)}
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert value is found[2][key] is None or value == pytest.approx(found[2][key], abs=0.01)
