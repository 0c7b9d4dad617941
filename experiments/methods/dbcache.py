"""DBCache of the cache-dit package (vipshop/cache-dit), plain and with Taylor forecasts: an optional extra, `peers`.

Site: the residual of the blocks between the first Fn, which always run and whose residual's relative change since the
last computed step decides, and the last Bn, which always run too; FLUX's two stacks count as one. Stored: the residuals
of the first and of the middle blocks, of both token streams, in each guidance branch; with `cache.options.taylor` also
their differences, which forecast the middle's residual (from the fourth computed step on). Decided online. Where we
differ: it is the package itself, put on the bare transformer, with its state made anew before every call, and Fn = 1 on
models of few blocks; what really runs is counted here, not by its statistics.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from erta.architectures import architecture_of, model_name
from erta.errors import ErtaError
from erta.pipeline import single_denoiser
from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.methods.common.counting import CountedTrace, counted
from experiments.methods.common.knob import Attach, Knob, check_number, knob_arm

PUBLISHED_FIRST = 8
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # else a line for every block and call; read at its import


def arm(setup: Setup) -> Arm:
    """DBCache at `cache.options.threshold`, or at the threshold that meets the budget.

    Raises ErtaError if cache-dit is missing, or does not know the transformer.
    """
    try:
        from cache_dit import BlockAdapterRegister, DBCacheConfig, TaylorSeerCalibratorConfig
    except ImportError as error:
        raise ErtaError(
            f"cache={setup.cfg.cache.name} needs the package cache-dit, an extra: pip install -e '.[peers]'"
        ) from error
    transformer, options = single_denoiser(setup.pipe), setup.options
    if not BlockAdapterRegister.is_supported(transformer):
        families = ", ".join(BlockAdapterRegister.supported_pipelines()[1])
        raise ErtaError(
            f"cache={setup.cfg.cache.name}: cache-dit does not know {model_name(transformer)}. It knows: {families}"
        )
    costs = setup.costs
    order = options["taylor"]
    if order is not None:
        check_number("taylor", order, 1, whole=True)

    def attach_with(threshold: float) -> Attach:
        config = DBCacheConfig(
            Fn_compute_blocks=first_blocks(transformer, options["first"]),
            Bn_compute_blocks=check_number("last", options["last"], 0, whole=True),
            residual_diff_threshold=check_number("threshold", threshold, 0),
            max_warmup_steps=check_number("warmup", options["warmup"], 1, whole=True),
            max_continuous_cached_steps=check_number("max_skip", options["max_skip"], 0, whole=True) or -1,
        )
        forecast = {} if order is None else {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)}
        return lambda pipe: cache_dit_cache(pipe, costs, cache_config=config, **forecast)

    return knob_arm(setup, Knob("threshold", 1e-4, 1e3), attach_with)


def first_blocks(transformer: Any, asked: int | None) -> int:
    """Fn: what was asked for, else 8 as published, but 1 if that were half of the blocks or more."""
    if asked is not None:
        return check_number("first", asked, 1, whole=True)
    stack = architecture_of(transformer).blocks
    count = math.inf if stack is None else len(stack.of(transformer))
    return PUBLISHED_FIRST if count > 2 * PUBLISHED_FIRST else 1


@contextmanager
def cache_dit_cache(pipe: Any, costs: dict[str, float], **configs: Any) -> Iterator[CountedTrace]:
    """Run `pipe` inside the `with` under cache-dit with these configs; afterwards it is as before.

    Yields the trace of the last call, with forward equivalents by `costs` (see `forward_costs`).
    """
    import cache_dit

    transformer = single_denoiser(pipe)
    own = {module: module.__dict__.get("forward") for module in transformer.modules()}
    children = list(transformer._modules)

    def state() -> list[Any]:
        contexts = [transformer._context_manager.get_context(name) for name in transformer._context_names]
        return [value for context in contexts for value in (context.buffers, *map(vars, _calibrators(context)))]

    def take_off() -> None:
        cache_dit.disable_cache(transformer)
        for module, forward in own.items():  # FLUX's is exchanged, which disable_cache leaves
            if forward is None:
                module.__dict__.pop("forward", None)
        transformer.__dict__.pop("_is_patched", None)
        for name in children:  # FLUX's two stacks come back in another order, by which diffusers finds the first block
            transformer._modules[name] = transformer._modules.pop(name)

    with counted(
        pipe,
        costs,
        put_on=lambda scheduler: cache_dit.enable_cache(transformer, **configs),
        take_off=take_off,
        before_call=lambda: cache_dit.refresh_context(transformer),
        state=state,
    ) as trace:
        yield trace


def _calibrators(context: Any) -> list[Any]:
    pairs = (*context.get_calibrators(), *context.get_cfg_calibrators())
    return [calibrator for calibrator in pairs if calibrator is not None]
