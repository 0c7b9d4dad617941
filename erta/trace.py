"""What a pipeline call really did, and the check that it is what was planned."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from erta.errors import ExecutionMismatch
from erta.guidance import expand
from erta.plan import Plan


class Stopwatch:
    """Sums the time between `start` and `stop` as the device sees it: with CUDA events there, so that measuring
    waits for nothing; `seconds` waits for the last of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._spans: list[tuple[Any, Any]] = []
        self._started: Any = None

    def start(self, device: torch.device) -> None:
        self._started = _mark(device.type == "cuda")

    def stop(self) -> None:
        self._spans.append((self._started, _mark(not isinstance(self._started, float))))
        self.count += 1

    @property
    def seconds(self) -> float:
        return sum(_between(begin, end) for begin, end in self._spans)


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


NOTHING_RECEIVED = (
    "the cache was installed but never called: something put the transformer's own forward back, or the "
    "pipeline uses another transformer. This result was made without the cache."
)


@dataclass(kw_only=True)
class CallTrace:
    """What one pipeline call executed: filled in by a hook during the call, and started anew at the next one.

    `executed` holds, for each cache context (guidance branch, or both in one), the steps in order and whether the
    transformer was run there. `forward_s` is the time inside the transformer at computed steps; `overhead_s` the
    hook's own at all steps, as the CPU sees it (on a GPU, launching its few operations). At the blocks site a
    reused step's embeddings and head count as the hook's. `stages` holds for each step of a planned run which
    transformer it ran in, or was reused in place of: 0, or 1 for a pipeline's second one. `reuse_share` is what part of
    a forward a reused step runs all the same, if it is known: a probe of the first block, or embeddings and head.
    `interrupted` says that the pipeline was told to stop (`pipe._interrupt`) before its last step.
    """

    calls: int = 0
    interrupted: bool = False
    executed: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)
    stages: dict[int, int] = field(default_factory=dict)
    cached: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    transformer: Stopwatch = field(default_factory=Stopwatch, repr=False)
    overhead_s: float = 0.0
    cache_bytes: int = 0
    cache_dtype: str = ""
    reuse_share: float = 0.0

    def begin(self) -> None:
        """Forget the last call."""
        self.executed, self.stages, self.cached = {}, {}, {}
        self.transformer, self.overhead_s, self.interrupted = Stopwatch(), 0.0, False

    def computed(self, branch: str, step: int, value: torch.Tensor | None, overhead_s: float) -> None:
        """Note a computed step and the tensor that it left in the cache; of one that was dropped the size stays."""
        self.executed.setdefault(branch, []).append((step, True))
        if value is not None:
            self.cached[branch] = value
        elif branch in self.cached:
            self.cached[branch] = self.cached[branch].to("meta")
        self.overhead_s += overhead_s

    def reused(self, branch: str, step: int, overhead_s: float) -> None:
        """Note a reused step."""
        self.executed.setdefault(branch, []).append((step, False))
        self.overhead_s += overhead_s

    def finish(self, interrupted: bool = False) -> None:
        """To be overridden: check the call that ended, or that was interrupted. Raises ExecutionMismatch."""
        raise NotImplementedError

    @property
    def forward_s(self) -> float:
        """Seconds inside the transformer in the last call."""
        return self.transformer.seconds

    @property
    def forwards(self) -> dict[str, float]:
        """Transformer forwards really made in the last call, with what reused steps ran of one, by cache context
        (guidance branch, or both in one).
        """
        computed = {branch: sum(computed for _, computed in steps) for branch, steps in self.executed.items()}
        return {b: n + self.reuse_share * (len(self.executed[b]) - n) for b, n in computed.items()}

    def reused_anything(self) -> bool:
        """Whether any forward of the last call was left out."""
        return any(not computed for steps in self.executed.values() for _, computed in steps)

    @property
    def num_executed(self) -> int:
        """Steps that the last call got to."""
        return max(map(len, self.executed.values()), default=0)

    def weigh(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note bytes and types of what a call kept, and let go of it."""
        kept = {id(value): value for value in tensors}.values()
        self.cache_bytes = sum(value.numel() * value.element_size() for value in kept)
        self.cache_dtype = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in kept}))
        self.cached = {}
        self.calls += 1


class UncheckedTrace(CallTrace):
    """The trace of a run that nothing was planned for: whoever looks at it checks what it sees."""

    def finish(self, interrupted: bool = False) -> None:
        """Nothing was planned."""
        self.interrupted = interrupted


@dataclass
class Trace(CallTrace):
    """The trace of a planned run, which is checked against its plan."""

    plan: Plan

    def finish(self, interrupted: bool = False) -> None:
        """Check the call that ended against the plan, of an interrupted one what it got to. Raises ExecutionMismatch."""
        plan = self.plan
        self.interrupted = interrupted and self.num_executed < plan.num_steps
        if not self.executed and not self.interrupted:
            raise ExecutionMismatch(NOTHING_RECEIVED)
        used = expand(self.executed, plan.guidance_scale)
        if plan.branches is not None and used != set(plan.branches) and self.executed:
            raise ExecutionMismatch(
                f"the plan is for the guidance branches {sorted(plan.branches)}, the call used {sorted(used)}"
            )
        wanted = list(enumerate(plan.mask))[: self.num_executed if self.interrupted else None]
        for branch, steps in self.executed.items():
            if steps != wanted:
                first = next((k for k, (a, b) in enumerate(zip(steps, wanted, strict=False)) if a != b), None)
                where = f"first difference at call {first}" if first is not None else f"{len(steps)} calls"
                raise ExecutionMismatch(
                    f"branch {branch!r} did not execute the plan ({plan.num_steps} steps, {plan.num_computed} computed): "
                    f"{where}. Was guidance switched off on the way, or the cache put under another hook?"
                )
        self.weigh(self.cached.values())

    def summary(self) -> str:
        """One line for people: computed and reused steps, seconds, cache bytes; of an interrupted call, how far it got."""
        plan, branches = self.plan, ", ".join(f"{k}: {n:g}" for k, n in sorted(self.forwards.items()))
        stopped = (
            f"interrupted after {self.num_executed} of {plan.num_steps} steps. Of the plan: "
            if self.interrupted
            else ""
        )
        return (
            f"{stopped}{plan.num_computed} of {plan.num_steps} steps computed, {plan.num_steps - plan.num_computed} reused; "
            f"forwards {branches or 'none'}; {self.forward_s:.3f} s in the transformer, "
            f"{1000 * self.overhead_s:.2f} ms in the hook; cache {self.cache_bytes} bytes ({self.cache_dtype or 'empty'})"
        )
