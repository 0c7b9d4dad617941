"""Work that several processes share: each takes the next piece when it is done with one, and reports what it finished.

The processes are started afresh (`spawn`), compose the configuration again and have an equal share of the CPU's cores.
Only the first process writes, so that files and the progress bar are the same as with one process.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from erta.errors import ErtaError
from experiments import config, console
from experiments.config import CONF

LOOK_AFTER_S = 5.0  # how often it is looked whether a silent process is still there


@dataclass(frozen=True)
class Event:
    """Something that is finished: its kind, the row that it belongs to, and what there is to write about it."""

    kind: str
    row: str
    about: dict[str, Any]


# Called once in each process, outside of what is timed; gives what turns a piece of work into events.
Prepare = Callable[..., Callable[[Any], Iterator[Event]]]


def share_cores(workers: int | None) -> int:
    """How many processes there are, by default one for each core and one on a GPU; each gets its share of the threads.

    Raises ErtaError for more processes than there are cores.
    """
    cores = torch.get_num_threads()
    count = workers if workers is not None else 1 if torch.cuda.is_available() else cores
    if count > cores:
        raise ErtaError(f"compare.workers={count}: there are {cores} CPU cores, so ask for at most {cores}")
    torch.set_num_threads(cores // count)
    return count


def do_all(workers: int, pieces: list[Any], prepare: Prepare, *given: Any) -> Iterator[Event]:
    """The events of all pieces, as they come. `prepare(*given)` is called once in each process.

    One worker is this process itself. Raises ErtaError if another one ends before its work is done; the rest is
    stopped then, as it is by Ctrl-C.
    """
    count = min(workers, len(pieces))
    if count == 1:
        run = prepare(*given)
        for piece in pieces:
            yield from run(piece)
    elif count:
        yield from _from_processes(count, pieces, prepare, given)


def _from_processes(count: int, pieces: list[Any], prepare: Prepare, given: tuple[Any, ...]) -> Iterator[Event]:
    context = multiprocessing.get_context("spawn")
    todo, events = context.Queue(), context.Queue()
    for piece in [*pieces, *[None] * count]:
        todo.put(piece)
    todo.cancel_join_thread()  # what nobody takes any more does not hold up the end
    own = (HydraConfig.instance().cfg, torch.get_num_threads(), todo, events, prepare, given)
    processes = [context.Process(target=_work, args=own, daemon=True) for _ in range(count)]
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C reaches all, and this one stops them
        for process in processes:
            process.start()
        signal.signal(signal.SIGINT, handler)
        working = count
        while working:
            try:
                event = events.get(timeout=LOOK_AFTER_S)
            except queue.Empty:
                if lost := [process.exitcode for process in processes if process.exitcode]:
                    raise ErtaError(_lost(lost[0])) from None
                continue
            if isinstance(event, str):
                raise ErtaError(event)
            if event is None:
                working -= 1
            else:
                yield event
        for process in processes:
            process.join(LOOK_AFTER_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: nobody takes what is made here


def _lost(code: int) -> str:
    memory = ", perhaps for want of memory: try compare.workers=1" if code == -signal.SIGKILL else ""
    return f"a process ended with code {code}{memory}. What was finished is kept: the same command goes on from there."


def _work(hydra_cfg: Any, threads: int, todo: Any, events: Any, prepare: Prepare, given: tuple[Any, ...]) -> None:

    def stop(*_: Any) -> None:  # on SIGTERM: leave in order, without waiting for somebody to take the last events
        events.cancel_join_thread()
        raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    console.quiet_libraries()
    console.out.quiet = True
    torch.set_num_threads(threads)
    HydraConfig.instance().cfg = hydra_cfg
    config.register()
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            run = prepare(*given)
            while (piece := todo.get()) is not None:
                for event in run(piece):
                    events.put(event)
        events.put(None)
    except Exception as error:
        events.put(f"{type(error).__name__}: {error}".splitlines()[0] + " (compare.workers=1 --traceback shows where)")
