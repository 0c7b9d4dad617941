"""Work that processes share: nothing lost, nothing hung, nobody left behind, the same results as one process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from erta.errors import BudgetError, ErtaError
from experiments.harness import row_sampling, workers
from experiments.harness.workers import Event, shared_threads
from experiments.output.files import read_lines


def misbehave(piece: str) -> None:
    if piece == "breaks":
        raise RuntimeError("broken\nsecond line")
    if piece == "refuses":
        raise BudgetError("too much\nask for less")
    if piece == "finds the disk full":
        raise OSError(28, "No space left on device")
    if piece == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if piece == "leaves":
        sys.exit(0)


def squares(power: int, meet: str = ""):
    if meet:  # nobody begins before both are here
        Path(meet, str(os.getpid())).touch()
        while len(list(Path(meet).iterdir())) < 2:
            time.sleep(0.05)

    def work(piece: int | str):
        if isinstance(piece, str):
            misbehave(piece)
            return
        time.sleep(0.02)
        yield Event("power", str(piece), {"value": piece**power, "pid": os.getpid()})

    return work


@pytest.fixture
def threads():
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_shared(threads):
    """Mutants: every process with all threads; more processes than pieces; threads that stay cut afterwards."""
    with (
        pytest.raises(ErtaError, match=r"compare.workers=3: torch has 2 CPU threads"),
        shared_threads(3, 9, True, "compare.workers"),
    ):
        pass
    found = {}
    for case in [(1, 9, True), (2, 9, False), (None, 9, True), (None, 9, False), (2, 1, True), (None, 0, True)]:
        with shared_threads(*case, "compare.workers") as count:
            found[case] = count, torch.get_num_threads()
        assert torch.get_num_threads() == 2
    assert list(found.values()) == [(1, 2), (2, 1), (2, 1), (1, 2), (1, 2), (1, 2)]


@pytest.mark.slow
def test_every_piece_is_done_once(tmp_path):
    """Mutants: a worker that stops at the first piece; an end that does not wait for the last events."""
    events = list(workers.side_by_side(2, "compare.workers", list(range(20)), squares, 3, str(tmp_path)))
    assert sorted(e.about["value"] for e in events) == [n**3 for n in range(20)]
    assert {str(e.about["pid"]) for e in events} == {path.name for path in tmp_path.iterdir()}
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("piece", "error", "message"),
    [
        ("breaks", ErtaError, r"^RuntimeError: broken \(compare.workers=1"),
        ("refuses", ErtaError, r"^too much\nask for less$"),
        ("finds the disk full", OSError, "No space left"),
        ("is killed", ErtaError, "code -9, perhaps for want of memory"),
        ("leaves", ErtaError, "code 0"),
    ],
)
def test_a_process_that_fails_ends_the_run(piece, error, message, monkeypatch):
    """Mutants: a run that waits for a gone process for ever, or ends as if all were done."""
    monkeypatch.setattr(workers, "LOOK_AFTER_S", 0.5)
    with pytest.raises(error, match=message):
        list(workers.side_by_side(2, "compare.workers", [1, piece, *range(5)], squares, 2))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_nobody_is_left_behind():
    """Mutant: events that are no longer wanted go on being made."""
    events = workers.side_by_side(2, "compare.workers", list(range(10_000)), squares, 2)
    assert next(events).kind == "power"
    events.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_comparison_in_two_processes(command, threads, monkeypatch):
    """The rows of two processes are those of one. Mutants: processes that do not get the command line's overrides; one
    process whatever was asked for; uncached samples of all threads, whose sums are rounded otherwise than the rows'.
    """
    threads_of_uncached, make = [], row_sampling.uncached_samples

    def counted(*given):
        threads_of_uncached.append(torch.get_num_threads())
        return make(*given)

    monkeypatch.setattr(row_sampling, "uncached_samples", counted)
    arguments = ("experiment=compare", "compare.methods=[ertacache,uniform]", "bench.num_prompts=2")
    found = {}
    for count in (1, 2):
        folder = f"outputs/{count}"
        code, printed = command(*arguments, "compare.quick=true", f"compare.workers={count}", f"hydra.run.dir={folder}")
        assert code == 0, printed
        rows = read_lines(Path(folder, "rows.jsonl"))
        found[count] = {(row["row"], row["index"]): row["psnr_db"] for row in rows}
        assert ("2 processes side by side" in Path(folder, "table.md").read_text()) == (count == 2)
    assert threads_of_uncached == [2, 2, 1]  # by this process; the first one sampled the rows, too
    assert set(found[1]) == {(name, k) for name in ("none", "ertacache (3)", "uniform (3)") for k in (0, 1)}
    assert found[1].keys() == found[2].keys()
    for key, value in found[1].items():
        assert value is found[2][key] is None or value == pytest.approx(found[2][key], abs=0.01)
