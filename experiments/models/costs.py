"""What a forward costs: FLOPs by layer, and the share of them that is left at a reused step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from erta.architectures import BlockStack, architecture_of
from erta.errors import ErtaError
from erta.pipeline import single_denoiser

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_flops(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """FLOPs of a forward as PyTorch counts them (matrix products and convolutions), and its output."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        velocity = transformer(**inputs, return_dict=False)[0]
    return counter.get_total_flops(), velocity


def flops_without_blocks(transformer: nn.Module, inputs: dict[str, torch.Tensor]) -> int | None:
    """FLOPs of what is left at a step that the `blocks` site reuses; None where that site is not known.

    The transformer has no blocks afterwards.
    """
    stack = architecture_of(transformer).blocks
    if stack is None:
        return None
    for blocks in stack.lists:
        setattr(transformer, blocks, nn.ModuleList())
    return count_flops(transformer, inputs)[0]


class _FirstForwardIsDone(Exception):
    """Ends a pipeline call after one forward."""


def forward_costs(pipe: Any, kwargs: dict[str, Any], transformer: nn.Module | None = None) -> dict[str, float]:
    """Each layer's share of an uncached forward's FLOPs, by its name: one forward is run and counted.

    FLOPs that a module spends outside its layers (attention's products) are charged to the first layer in it.

    Args:
        transformer: the one that runs first, on a pipeline with two.
    """
    transformer = transformer if transformer is not None else single_denoiser(pipe)
    counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention_flops})
    spent: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> list[Any]:
        entered: list[int] = []

        def leave(*_: Any) -> None:
            spent[name] = spent.get(name, 0) + counter.get_total_flops() - entered.pop()

        return [
            module.register_forward_pre_hook(lambda *_: entered.append(counter.get_total_flops())),
            module.register_forward_hook(leave),
        ]

    def enter(*_: Any) -> None:
        counter.__enter__()

    def done(*_: Any) -> None:
        counter.__exit__(None, None, None)
        raise _FirstForwardIsDone

    handles = [transformer.register_forward_pre_hook(enter)]
    handles += [handle for name, module in transformer.named_modules() for handle in watch(name, module)]
    handles.append(transformer.register_forward_hook(done))
    try:
        pipe(prompt="", output_type="latent", generator=torch.Generator("cpu").manual_seed(0), **kwargs)
    except _FirstForwardIsDone:
        return _shares(transformer, spent)
    finally:
        for handle in handles:
            handle.remove()
        pipe.maybe_free_model_hooks()
    raise ErtaError(f"{type(pipe).__name__} never called its transformer")


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _shares(transformer: nn.Module, spent: dict[str, int]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, module in transformer.named_modules():
        inside = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        alone = spent.get(name, 0) - sum(_inclusive(child, transformer, spent) for child in inside)
        if alone > 0:
            layers = (n for n, m in module.named_modules(prefix=name) if not list(m.children()) and spent.get(n))
            layer = next(layers, name)
            shares[layer] = shares.get(layer, 0.0) + alone / spent[""]
    return shares


def _inclusive(name: str, transformer: nn.Module, spent: dict[str, int]) -> int:
    """FLOPs inside a module; of a list of modules, which is never called itself, those of its members."""
    if name in spent:
        return spent[name]
    children = transformer.get_submodule(name).named_children()
    return sum(_inclusive(f"{name}.{child}", transformer, spent) for child, _ in children)


def outside_blocks(stack: BlockStack, costs: dict[str, float]) -> float:
    """The share of embeddings and head in a forward whose layers have these `costs`."""
    return sum(cost for name, cost in costs.items() if not stack.is_inside(name))
