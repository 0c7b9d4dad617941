"""FORA, by hand."""

from __future__ import annotations

import pytest
import torch

from experiments.methods.common.modules import components_of, every, module_cache
from experiments.models.costs import forward_costs
from tests.experiments.methods.layers import of_layers
from tests.pipelines import FLUX_CALL, WAN_CALL, build_flux, build_pipe, generate

FLUX_BRANCHES = (
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)\.|single_transformer_blocks\.\d+\.(attn|proj_mlp|proj_out)"
)
FULL = [True, False, False, True, False, False]


@pytest.mark.parametrize("build", [build_pipe, build_flux])
def test_fora_by_hand(build):
    """Interval 3 of 6 steps: steps 0 and 3 in full; at 1, 2 and 4, 5 every module gives what it gave then, uncomputed.

    Mutants: FLUX's layers charged where a hook answers for them (its projections are hooked themselves), attention
    and feed-forward run whose projection is not, the output of the step before last.
    """
    pipe, call = build(), WAN_CALL if build is build_pipe else FLUX_CALL
    costs, given = forward_costs(pipe, call), {}
    kinds = components_of(pipe.transformer)
    with module_cache(pipe, dict.fromkeys(kinds, every(3, 6)), costs) as trace:
        handles = [
            module.register_forward_hook(lambda module, args, made: given.setdefault(module, []).append(made))
            for modules in kinds.values()
            for module in modules
        ]
        made = generate(pipe, call)
        for handle in handles:
            handle.remove()
    kept = r"blocks\.\d+\.(attn1|attn2|ffn)\." if build is build_pipe else FLUX_BRANCHES
    rest = 1 - of_layers(pipe, costs, kept)
    assert 0 < rest < 0.4
    for shares in trace.shares.values():
        assert shares == pytest.approx([1 if full else rest for full in FULL])
    branches = len(trace.shares)
    for outputs in given.values():
        for step in (1, 2, 4, 5):
            for branch in range(branches):
                assert outputs[step * branches + branch] is outputs[step // 3 * 3 * branches + branch]
    assert torch.isfinite(made).all() and not any("forward" in m.__dict__ for m in pipe.transformer.modules())
