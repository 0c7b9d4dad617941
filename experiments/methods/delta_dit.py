"""Delta-DiT (Chen et al., 2024, arXiv 2406.01125): the delta of a range of blocks is kept, not their output.

Site: what a range of blocks adds to the tokens (in FLUX to both token streams). Stored: one such delta in each guidance
branch. Static: everything runs at every `interval`-th step; between, the range is left out and its delta added, so what
the other blocks make of the new input gets through. Early steps, which settle the outline, leave out the last blocks,
later ones, which settle details, the first. Where we differ: the paper's sizes of the range and of the early phase are
not known to us for these models; here they are shares of the blocks (0.75) and of the steps (0.5), and a range in use at
the boundary stays until the next full step. `cache.steps` reaches no less than what the other blocks take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from erta.architectures import BlockStack, blocks_of
from erta.pipeline import single_denoiser
from erta.scheduler import step_index
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Attach, Knob, check_number, knob_arm
from experiments.methods.common.modules import hooked


def arm(setup: Setup) -> Arm:
    """Delta-DiT at `cache.options.interval`, or at the smallest interval that fits the budget.

    Raises InstallError for a transformer whose blocks are not known.
    """
    steps, options, transformer = setup.cfg.model.num_inference_steps, setup.options, single_denoiser(setup.pipe)
    stack = blocks_of(transformer, "cache=delta_dit")
    blocks = stack.of(transformer)
    share, gate = check_number("blocks", options["blocks"], 0), check_number("gate", options["gate"], 0)
    left_out = min(len(blocks), max(1, round(share * len(blocks))))
    costs = setup.costs

    def attach_with(interval: int) -> Attach:
        ranges = schedule(steps, check_number("interval", interval, 1, whole=True), gate, len(blocks), left_out)

        def hooks_of(scheduler: Any) -> list[tuple[nn.Module, ModelHook]]:
            states = StateManager(_RangeState)
            return [
                (block, DeltaHook(index, ranges, lambda: step_index(scheduler), states, stack))
                for index, block in enumerate(blocks)
            ]

        return lambda pipe: hooked(pipe, costs, hooks_of)

    return knob_arm(setup, Knob("interval", 1, steps, whole=True), attach_with)


Range = tuple[int, int, bool]  # first block, end, whether it is computed


def schedule(num_steps: int, interval: int, gate: float, num_blocks: int, left_out: int) -> list[Range]:
    """The range of every step: the last `left_out` blocks before the share `gate` of the steps, then the first."""
    ranges = []
    for step in range(num_steps):
        full = step - step % interval
        first = num_blocks - left_out if full < gate * num_steps else 0
        ranges.append((first, first + left_out, step == full))
    return ranges


class _RangeState(BaseState):
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start: list[torch.Tensor] | None = None
        self.delta: list[torch.Tensor] | None = None


class DeltaHook(ModelHook):
    """One of the blocks: runs it, or hands its input on, at the end of the range with the delta added.

    Args:
        ranges: by step.
        states: shared by all blocks.
    """

    _is_stateful = True

    def __init__(
        self,
        index: int,
        ranges: list[Range],
        current_step: Callable[[], int],
        states: StateManager,
        stack: BlockStack,
    ) -> None:
        super().__init__()
        self.index, self.ranges, self.current_step = index, ranges, current_step
        self.states, self.stack = states, stack

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first, end, full = self.ranges[self.current_step()]
        if not first <= self.index < end:
            return self.fn_ref.original_forward(*args, **kwargs)
        state, streams = self.states.get_state(), self.stack.streams(args, kwargs)
        if not full:
            if self.index == end - 1:
                streams = [stream + delta for stream, delta in zip(streams, state.delta, strict=True)]
            return streams[0] if self.stack.output_index is None else tuple(streams)
        if self.index == first:
            state.start = streams
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.index == end - 1:
            made = [output] if self.stack.output_index is None else list(output)
            state.delta = [after - before for after, before in zip(made, state.start, strict=True)]
            state.start = None
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module
