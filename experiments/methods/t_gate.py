"""T-GATE (Zhang et al., 2024, arXiv 2404.02747): cross-attention is needed early only, self-attention now and then.

Site: the outputs of cross- and self-attention. Stored: one output a module and guidance branch. Static:
cross-attention is computed before step `gate` and frozen from there on. Self-attention (over space and over time, where there
are two) is computed in the first `warmup` steps, then at every `before`-th step, and from the gate on at every `after`-th. Feed-forwards always run, so
`cache.steps` cannot go below their share (the error says where that is). Where we differ: each guidance branch keeps
its own cross-attention, while the authors average both and leave the unconditional branch out after the gate.
"""

from __future__ import annotations

from erta.pipeline import single_denoiser
from erta.policy import Mask
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number
from experiments.methods.common.modules import Schedule, components_of, module_arm


def arm(setup: Setup) -> Arm:
    """T-GATE at `cache.options.after`, or at the smallest interval after the gate that fits the budget."""
    steps, options = setup.cfg.model.num_inference_steps, setup.options
    gate = round(check_number("gate", options["gate"], 0) * steps)
    warmup = check_number("warmup", options["warmup"], 1, whole=True)
    before = check_number("before", options["before"], 1, whole=True)

    over_time = "temporal" in components_of(single_denoiser(setup.pipe))

    def schedule(after: int) -> Schedule:
        made = masks(steps, gate, warmup, before, check_number("after", after, 1, whole=True))
        return {**made, "temporal": made["attention"]} if over_time else made

    return module_arm(setup, Knob("after", 1, steps, whole=True), schedule)


def masks(num_steps: int, gate: int, warmup: int, before: int, after: int) -> Schedule:
    """When cross- and self-attention are computed."""
    cross: Mask = tuple(step < gate or step == 0 for step in range(num_steps))
    own: Mask = tuple(
        step < warmup or ((step - gate) % after == 0 if step >= gate else (step - warmup) % before == 0)
        for step in range(num_steps)
    )
    return {"cross": cross, "attention": own}
