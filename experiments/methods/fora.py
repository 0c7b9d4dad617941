"""FORA (Selvaraju et al., 2024, arXiv 2407.01425): attention and feed-forward outputs kept between fixed steps.

Site: the output of every attention and feed-forward module (of FLUX's single blocks: of both, after their projection). Stored: one such output a module and guidance branch.
Static: all are computed at every `interval`-th step. Norms, modulation, embeddings and head run at every step, so what
`cache.steps` can reach is one of the counts of the intervals 1, 2, 3 …; it takes the largest that is not above it.
Where we differ: Wan's cross-attention is kept as well (DiT, which the paper uses, has none).
"""

from __future__ import annotations

from erta.pipeline import single_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.knob import Knob, check_number
from experiments.methods.common.modules import Schedule, components_of, every, module_arm


def arm(setup: Setup) -> Arm:
    """FORA at `cache.options.interval`, or at the smallest interval that fits the budget."""
    steps = setup.cfg.model.num_inference_steps

    def schedule(interval: int) -> Schedule:
        mask = every(check_number("interval", interval, 1, whole=True), steps)
        return dict.fromkeys(components_of(single_denoiser(setup.pipe)), mask)

    return module_arm(setup, Knob("interval", 1, steps, whole=True), schedule)
