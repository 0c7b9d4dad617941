"""A folder has one owner; the lock of a process that is gone is free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from erta.errors import ErtaError
from experiments.output.owner import LOCK, OWNER, OwnedError, owner_of, owning
from experiments.output.run_folder import open_folder
from tests.commands import config

HOLD = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_with_the_first_ones_pid_and_host(tmp_path, holder):
    """Mutant: a lock that is taken over while its process works."""
    (tmp_path / OWNER).write_text('{"pid": 4711, "host": "there", "since": "then", "config_hash": "x"}')
    with (
        pytest.raises(OwnedError, match="process 4711 on there, since then, is at work in .*wait=true"),
        owning(tmp_path, "x", wait=False),
    ):
        pass
    assert owner_of(tmp_path).pid == 4711


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, holder):
    (tmp_path / OWNER).write_text('{"pid": 4711, "host": "there", "since": "then", "config_hash": "x"}')
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owning(tmp_path, "y", wait=False):
        owner = owner_of(tmp_path)
        assert [owner.pid, owner.host, owner.config_hash] == [os.getpid(), socket.gethostname(), "y"]
    assert owner_of(tmp_path) is None


def test_waiting_ends_with_the_other_process(tmp_path, holder):
    started = time.monotonic()
    threading.Timer(0.8, holder.kill).start()
    with owning(tmp_path, "x", wait=True):
        assert time.monotonic() - started > 0.7


def test_two_runs_of_one_configuration(tmp_path, holder):
    """The folder of a run that another process is at work in is neither shared nor passed over for a new one."""
    folder = tmp_path / "outputs" / "day" / "run"
    with open_folder(config(), folder, False):
        (folder / "per_prompt.jsonl").write_text("{}\n")
        with pytest.raises(ErtaError, match="is at work in"), open_folder(config(), folder.with_name("later"), False):
            pass
        with open_folder(config("cache=uniform"), folder, False) as other:  # another run in the same second
            assert other == folder.with_name("run+")
    with open_folder(config(), folder.with_name("later"), False) as again:
        assert again == folder
