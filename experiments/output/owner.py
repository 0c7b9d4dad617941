"""A folder that is written to has one owner: a lock that ends with its process, and beside it who that is."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from erta.errors import ErtaError
from experiments.output import console

LOCK, OWNER = "run.lock", "run.lock.json"
LOOK_EVERY_S = 0.5
KNOWN_AFTER_S = 2.0  # how long an owner may take to say who it is


class OwnedError(ErtaError):
    """A folder that another process is at work in."""

    def __init__(self, folder: Path, owner: Owner | None) -> None:
        self.owner = owner
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host}, since {owner.since},"
        super().__init__(
            f"{who} is at work in {folder}. Wait for it with wait=true, or stop it: the same command then goes on."
        )


@dataclass(frozen=True)
class Owner:
    """The process that holds a folder, and the digest of the configuration that it runs."""

    pid: int
    host: str
    since: str
    config_hash: str


def owner_of(folder: Path) -> Owner | None:
    """Who says that the folder is his; None if nobody does, or the word is damaged."""
    try:
        return Owner(**json.loads((folder / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def owning(folder: Path, config_hash: str, wait: bool) -> Iterator[None]:
    """Inside the `with`, this process alone writes into `folder`, which is made if it is not there.

    The lock is the operating system's: that of a process which is gone is free, whatever the file beside it says. On a file
    system that several machines share it holds between them as well, if the system passes locks on (NFS 4, Lustre with `flock`).

    Args:
        wait: for the process that holds it. Raises OwnedError with its pid and host otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = _known_owner(folder)
        if not wait:
            raise OwnedError(folder, owner) from None
        who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
        console.note(f"waiting for {who}, which is at work in {folder}")
        lock.acquire(poll_interval=LOOK_EVERY_S)
    try:
        me = Owner(os.getpid(), socket.gethostname(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), config_hash)
        (folder / OWNER).write_text(json.dumps(asdict(me)) + "\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # before the lock is free: afterwards it may be another's
            (folder / OWNER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _known_owner(folder: Path) -> Owner | None:
    end = time.monotonic() + KNOWN_AFTER_S
    while (owner := owner_of(folder)) is None and time.monotonic() < end:
        time.sleep(LOOK_EVERY_S / 5)
    return owner
