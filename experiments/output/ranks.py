"""Ranks: the processes of one command under `torchrun`. They share what is missing, and the first one merges what they made.

A rank writes finished lines into a file of its own beside the run's, so that none is lost when one dies: the next command, with
any number of ranks, merges what is there and shares the rest. Without torchrun there is one rank, and nothing here does anything.

gloo on CPUs; on GPUs nccl beside it, each rank with its own device. What is exchanged is small: who does what, and sums of scores.

torch is imported where it is used: every command line imports this file, `--help` too.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from erta.errors import ErtaError
from experiments.output import console
from experiments.output.files import read_lines, write_lines

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("works by itself", default=False)
LONGEST_WAIT = timedelta(days=7)  # for the slowest rank: a share may be hours of work


class FailedElsewhere(ErtaError):
    """What went wrong on the first rank, which says so."""


def rank() -> int:
    """Of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if _is_asked() else 0


def count() -> int:
    """Of all processes of this command."""
    return int(os.environ.get("WORLD_SIZE", 1)) if _is_asked() else 1


def is_first() -> bool:
    """Whether this process merges, prints and writes what there is one of."""
    return rank() == 0


def _is_asked() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # as torch.distributed.is_torchelastic_launched does


@contextmanager
def together() -> Iterator[None]:
    """Inside the `with`, the ranks know each other. All but the first are silent."""
    if count() == 1:
        yield
        return
    import torch
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise ErtaError(
                f"torchrun started rank {place} on a machine with {torch.cuda.device_count()} GPUs: --nproc-per-node is too large"
            )
        torch.cuda.set_device(place)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT)
    if not is_first():
        console.quiet_process()
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside the `with`, this rank works by itself: nothing there waits for the others, who do something else."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _is_one() -> bool:
    return count() == 1 or _ALONE.get()


def share(todo: Sequence[T]) -> list[T]:
    """This rank's part of what is to be done: every n-th piece."""
    return list(todo) if _is_one() else list(todo[rank() :: count()])


def share_of_each(pieces: Iterable[T]) -> Iterable[T]:
    """The same of what comes one after the other."""
    return pieces if _is_one() else itertools.islice(pieces, rank(), None, count())


def same(make: Callable[[], T]) -> T:
    """What `make` gives on the first rank, on all of them. An error there is one on all of them."""
    if _is_one():
        return make()
    from torch import distributed

    box: list[Any] = [None]
    if is_first():
        try:
            box = [(make(), None)]
        except Exception as error:
            distributed.broadcast_object_list([(None, _sendable(error))], src=0)
            raise
    distributed.broadcast_object_list(box, src=0)
    made, failed = box[0]
    if failed is not None:
        raise failed
    return made


def _sendable(error: Exception) -> Exception:
    if isinstance(error, OSError):
        return error
    return FailedElsewhere(str(error) if isinstance(error, ErtaError) else f"{type(error).__name__}: {error}")


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if not _is_one():
        from torch import distributed

        distributed.barrier()


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order, on all of them."""
    if _is_one():
        return [value]
    from torch import distributed

    box: list[Any] = [None] * count()
    distributed.all_gather_object(box, value)
    return box


def added(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, on the device of `numbers`."""
    if not _is_one():
        from torch import distributed

        numbers = numbers.clone()
        distributed.all_reduce(numbers)
    return numbers


def own_file(path: Path) -> Path:
    """Where this rank writes lines that are to be in `path`."""
    return path if count() == 1 else path.with_name(f"{path.stem}.rank{rank()}{path.suffix}")


def merge_lines(path: Path) -> None:
    """Put what ranks have written, in this command or one before it, into `path`. All ranks come here and go on together.

    A line that is there twice, as a rank's file was merged and not yet taken away when the process died, is merged once.
    """
    wait_for_all()
    if is_first():
        parts = sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))
        if parts:
            lines = [line for file in (path, *parts) for line in read_lines(file)]
            write_lines(path, list({json.dumps(line, sort_keys=True): line for line in lines}.values()))
            for part in parts:
                part.unlink()
    wait_for_all()
