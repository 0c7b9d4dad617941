"""DiCache (Bu et al., 2025, arXiv 2508.17356): the first block, run at every step, says how much the others changed.

Site: the block stack's residual r, in token space. Stored in each guidance branch: the residuals and the probes of the
last two computed steps, and the probe of the last step. Decided online, for each branch.

The probe p is block 0's residual. The rule adds up `mean|h_t - h_{t-1}| / mean|h_{t-1}|` of block 0's output h and
reuses while the sum stays below `delta`. A reused step takes `r_{-2} + gamma (r_{-1} - r_{-2})` with
`gamma = clip(mean|p - p_{-2}| / mean|p_{-1} - p_{-2}|, 1, 1.5)`. A computed step goes on from the probe, so block 0 is
run once. Where we differ: the last step is computed, and one computed step before is enough to reuse (with its r). The
embeddings and the head that a probe runs are charged at reused steps alone, not once more where its step is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from erta.architectures import blocks_of
from erta.online import Call, OnlineRule, mean_change, online, relative_change
from erta.pipeline import single_denoiser
from erta.site import BlocksSite, Forward, _Stand
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Attach, Knob, check_number, knob_arm
from experiments.models.costs import outside_blocks

GAMMA = (1.0, 1.5)


def arm(setup: Setup) -> Arm:
    """DiCache at `cache.options.delta`, or at the delta that meets the budget, its probes counted in."""
    retention = setup.options["retention"]
    share = probe_share(setup)

    def attach_with(delta: float) -> Attach:
        rule = DiCache(delta, retention)
        return lambda pipe: online(pipe, rule, rule.on, reuse_share=share)

    made = knob_arm(setup, Knob("delta", 1e-4, 1e3), attach_with)
    made.report["probe_share"] = share
    return made


def probe_share(setup: Setup) -> float:
    """What part of a forward's FLOPs is left when all blocks but the first are left out."""
    transformer = single_denoiser(setup.pipe)
    stack, costs = blocks_of(transformer, "cache=dicache"), setup.costs
    first = f"{stack.lists[0]}.0."
    return outside_blocks(stack, costs) + sum(cost for name, cost in costs.items() if name.startswith(first))


class DiCache(OnlineRule):
    """See the module.

    Args:
        delta: the accumulated change of the probe at which the blocks are run; published: Wan 0.2, FLUX 0.4.
        retention: this share of the steps is computed first; published: 0.2.
    """

    def __init__(self, delta: float, retention: float = 0.2) -> None:
        self.delta = check_number("delta", delta, 0)
        self.retention = check_number("retention", retention, 0)
        self.site: Any = None
        self.begin(0)

    def on(self, transformer: nn.Module) -> ProbeSite:
        """The site of this rule on a transformer."""
        self.site = ProbeSite(transformer)
        return self.site

    def begin(self, num_steps: int) -> None:
        self.accumulated: dict[str, float] = {}
        self.output: dict[str, torch.Tensor] = {}  # h of the last step
        self.probe: dict[str, torch.Tensor] = {}  # p of this step
        self.computed_steps: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # (p, r), the last two

    def should_compute(self, call: Call) -> bool:
        if call.is_last or call.step < self.retention * call.num_steps:
            return True
        output, self.probe[call.branch] = self.site.probe(call)
        self.accumulated[call.branch] += relative_change(output, self.output[call.branch])
        self.output[call.branch] = output
        return self.accumulated[call.branch] >= self.delta

    def computed(self, call: Call, velocity: torch.Tensor, residual: torch.Tensor) -> None:
        output, probe = self.site.seen()
        self.output[call.branch], self.accumulated[call.branch] = output, 0.0
        self.computed_steps[call.branch] = [*self.computed_steps.get(call.branch, [])[-1:], (probe, residual)]

    def stand_in(self, call: Call, kept: torch.Tensor) -> torch.Tensor:
        self.site.forget()
        if len(self.computed_steps[call.branch]) < 2:
            return kept
        (p_2, r_2), (p_1, r_1) = self.computed_steps[call.branch]
        between = mean_change(p_1, p_2)
        ratio = mean_change(self.probe[call.branch], p_2) / between if between > 0 else GAMMA[0]
        return r_2 + min(max(ratio, GAMMA[0]), GAMMA[1]) * (r_1 - r_2)


class _Replay(nn.Module):
    """Gives what block 0 made when it was probed."""

    output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class ProbeSite(BlocksSite):
    """The blocks site, with block 0 run alone on request, and not run again in the forward that follows."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        first, *others = self.watched
        before, block, *rest = self.watched[first]
        self.after_first, self.replay, self.block = _Stand(self.stack), _Replay(), block
        self.fresh = {**self.watched, first: nn.ModuleList([before, block, self.after_first, *rest])}
        self.resumed = {**self.watched, first: nn.ModuleList([before, self.replay, self.after_first, *rest])}
        self.alone = {name: nn.ModuleList() for name in others}
        self.alone[first] = nn.ModuleList([before, block, self.after_first])
        self.start: torch.Tensor | None = None

    def compute(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """As at the blocks site; from the probe on if there is one."""
        self.watched = self.fresh if self.replay.output is None else self.resumed
        handle = self.before.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            return super().compute(forward, args, kwargs)
        finally:
            handle.remove()
            self.forget()

    def probe(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens after block 0 and its residual, (batch, tokens, width)."""
        assert call.forward is not None

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.replay.output = output

        handles = [
            self.block.register_forward_hook(keep),
            self.before.register_forward_pre_hook(self._note, with_kwargs=True),
        ]
        try:
            self.run(self.alone, call.forward, call.args, call.kwargs or {})
        finally:
            for handle in handles:
                handle.remove()
        return self.seen()

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the last probe or forward."""
        assert self.after_first.tokens is not None and self.start is not None
        return self.after_first.tokens, self.after_first.tokens - self.start

    def forget(self) -> None:
        """Drop the probe: what follows starts at block 0 again."""
        self.replay.output = None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.start = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
