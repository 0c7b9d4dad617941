"""Work that several processes share: each takes the next piece when it is done with one, and reports what it finished.

The processes are started afresh (`spawn`), compose the configuration again and have an equal share of the CPU's threads.
Only the first process writes into the run's folder and on the terminal, as it does when it works alone.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from erta.errors import ErtaError
from experiments.harness import config
from experiments.harness.config import CONF
from experiments.output import console

LOOK_AFTER_S = 5.0  # how long all are silent before it is looked whether they are still there
STOP_AFTER_S = 10.0  # how long a process may take to leave


@dataclass(frozen=True)
class Event:
    """Something that is finished: its kind, the row that it belongs to, and what there is to write about it."""

    kind: str
    row: str
    about: dict[str, Any]


# Called once in each process, outside of what is timed; gives what turns a piece of work into events.
Prepare = Callable[..., Callable[[Any], Iterator[Event]]]


@contextmanager
def shared_threads(asked: int | None, pieces: int, by_default: bool, key: str) -> Iterator[int]:
    """Inside the `with`, each of as many processes as it yields has its share of torch's threads.

    Args:
        asked: processes; None: one a thread if that is what happens `by_default`, else one.
        pieces: of work; no more processes than that are of use.
        key: of the configuration that asked, for the error.

    Raises ErtaError for more processes than torch has threads.
    """
    threads = torch.get_num_threads()
    if asked is not None and asked > threads:
        raise ErtaError(f"{key}={asked}: torch has {threads} CPU threads to share, so ask for at most {threads}")
    count = max(1, min(asked if asked is not None else threads if by_default else 1, pieces))
    torch.set_num_threads(threads // count)
    try:
        yield count
    finally:
        torch.set_num_threads(threads)


def side_by_side(count: int, key: str, pieces: list[Any], prepare: Prepare, *given: Any) -> Iterator[Event]:
    """The events of all pieces, as they come, from `count` processes that each call `prepare(*given)` once.

    `key` is what asked for so many, for errors.

    Raises ErtaError or OSError, as the first process to fail did, and ErtaError for one that is gone, when the others
    are done. Close it where events are no longer wanted: the processes are stopped then, as they are by Ctrl-C.
    """
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for piece in [*pieces, *[None] * count]:
        todo.put(piece)
    todo.cancel_join_thread()  # what nobody takes any more does not hold up the end
    own = (HydraConfig.instance().cfg, torch.get_num_threads(), key, todo, events, prepare, given)
    processes = [context.Process(target=_work, args=(index, *own), daemon=True) for index in range(count)]
    working, gone = set(range(count)), set[int]()
    try:
        _start(processes)
        while working:
            try:
                event = events.get(timeout=LOOK_AFTER_S)
            except queue.Empty:
                before, gone = gone, {index for index in working if not processes[index].is_alive()}
                if both := gone & before:  # at two looks: its last word may have been on its way at the first
                    raise ErtaError(_lost(processes[min(both)].exitcode, key)) from None
                continue
            if isinstance(event, Exception):
                raise event
            if isinstance(event, int):
                working.remove(event)
            else:
                yield event
    finally:
        _stop([process for process in processes if process.pid], leaving=not working)


def _start(processes: list[Any]) -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C reaches all, and this one stops them
    try:
        for process in processes:
            process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _stop(processes: list[Any], leaving: bool) -> None:
    for process in processes:
        if not leaving:
            process.terminate()
    for process in processes:
        process.join(STOP_AFTER_S)
        if process.is_alive():
            process.kill()
            process.join()


def _lost(code: int | None, key: str) -> str:
    memory = f", perhaps for want of memory: try {key}=1" if code == -signal.SIGKILL else ""
    return f"a process ended with code {code}{memory}. What was finished is kept: the same command goes on from there."


def _work(
    index: int, hydra_cfg: Any, threads: int, key: str, todo: Any, events: Any, prepare: Prepare, given: tuple[Any, ...]
) -> None:
    def stop(*_: Any) -> None:  # on SIGTERM: leave in order, without waiting for somebody to take the last events
        events.cancel_join_thread()
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console.quiet_libraries()
    console.quiet_process()
    torch.set_num_threads(threads)
    HydraConfig.instance().cfg = hydra_cfg
    config.register()
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            run = prepare(*given)
            while (piece := todo.get()) is not None:
                for event in run(piece):
                    events.put(event)
        events.put(index)
    except (ErtaError, OSError) as error:
        events.put(error if isinstance(error, OSError) else ErtaError(str(error)))
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        events.put(ErtaError(f"{text} ({key}=1 --traceback shows where)"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: nobody takes what is made here
