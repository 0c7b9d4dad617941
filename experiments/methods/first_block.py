"""FirstBlockCache, as diffusers ships it."""

from __future__ import annotations

from diffusers.hooks import FirstBlockCacheConfig

from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.diffusers_caches import shipped_arm
from experiments.methods.common.knob import Knob


def arm(setup: Setup) -> Arm:
    """FirstBlockCache (ParaAttention, chengzeyi/ParaAttention): block 0 is run, its residual's change decides on the others.

    Site: the residual of all blocks but the first. Stored: it, and the first block's output and residual, in each guidance
    branch. Decided online, for each branch, by the relative L1 change of block 0's residual since the last computed step.
    Where we differ: it is diffusers' own; the threshold comes from the budget.
    """
    return shipped_arm(setup, Knob("threshold", 1e-4, 1e3), FirstBlockCacheConfig)
