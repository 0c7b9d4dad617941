"""What a pipeline call really did, and the check that it is what was planned."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from erta.errors import ExecutionMismatch
from erta.plan import Plan


@dataclass
class Trace:
    """Filled in by the hook during a call, and started anew at the next one.

    `forward_s` is the time inside the transformer at computed steps, `overhead_s` the hook's own time at all
    steps; both as the CPU sees them (on a GPU, launching only: nothing is synchronised).
    """

    plan: Plan
    calls: int = 0
    executed: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)
    cached: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    forward_s: float = 0.0
    overhead_s: float = 0.0
    cache_bytes: int = 0
    cache_dtype: str = ""

    def begin(self) -> None:
        """Forget the last call."""
        self.executed, self.cached = {}, {}
        self.forward_s = self.overhead_s = 0.0

    def computed(self, branch: str, step: int, value: torch.Tensor, forward_s: float, total_s: float) -> None:
        """Note a computed step and the tensor that it left in the cache."""
        self.executed.setdefault(branch, []).append((step, True))
        self.cached[branch] = value
        self.forward_s += forward_s
        self.overhead_s += total_s - forward_s

    def reused(self, branch: str, step: int, total_s: float) -> None:
        """Note a reused step."""
        self.executed.setdefault(branch, []).append((step, False))
        self.overhead_s += total_s

    @property
    def forwards(self) -> dict[str, int]:
        """Transformer forwards really made in the last call, by guidance branch."""
        return {branch: sum(computed for _, computed in steps) for branch, steps in self.executed.items()}

    def finish(self) -> None:
        """Check the call that ended against the plan. Raises ExecutionMismatch if they differ."""
        plan = self.plan
        if not self.executed:
            raise ExecutionMismatch(
                "the cache was installed but never called: its hook was dropped (model offload does that after the "
                "first call) or the pipeline uses another transformer. This result was made without the cache."
            )
        if plan.branches is not None and set(self.executed) != set(plan.branches):
            raise ExecutionMismatch(
                f"the plan is for the guidance branches {sorted(plan.branches)}, the call used {sorted(self.executed)}"
            )
        wanted = list(enumerate(plan.mask))
        for branch, steps in self.executed.items():
            if steps != wanted:
                first = next((k for k, (a, b) in enumerate(zip(steps, wanted, strict=False)) if a != b), None)
                where = f"first difference at call {first}" if first is not None else f"{len(steps)} calls"
                raise ExecutionMismatch(
                    f"branch {branch!r} did not execute the plan ({plan.num_steps} steps, {plan.num_computed} computed): "
                    f"{where}. Was the pipeline interrupted, or called with other steps?"
                )
        self.cache_bytes = sum(value.numel() * value.element_size() for value in self.cached.values())
        self.cache_dtype = ", ".join(
            sorted({str(value.dtype).removeprefix("torch.") for value in self.cached.values()})
        )
        self.cached = {}
        self.calls += 1

    def summary(self) -> str:
        """One line for people: computed and reused steps, seconds, cache bytes."""
        plan, branches = self.plan, ", ".join(f"{k}: {n}" for k, n in sorted(self.forwards.items()))
        return (
            f"{plan.num_computed} of {plan.num_steps} steps computed, {plan.num_steps - plan.num_computed} reused; "
            f"forwards {branches or 'none'}; {self.forward_s:.3f} s in the transformer, "
            f"{1000 * self.overhead_s:.2f} ms in the hook; cache {self.cache_bytes} bytes ({self.cache_dtype or 'empty'})"
        )
