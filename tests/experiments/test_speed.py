"""experiment=speed: the real pipeline around untrained weights, timed with and without a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from erta.errors import ErtaError
from experiments import speed
from experiments.harness.config import CONF
from experiments.models import untrained
from experiments.models.load import load_pipeline


def configured(*overrides: str):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=["experiment=speed", "speed.pairs=1", *overrides])


@pytest.mark.parametrize(
    ("model", "site", "forwards"),
    [("wan21_tiny", "output", [20, 8]), ("flux_tiny", "output", [10, 4]), ("flux_tiny", "blocks", [10, 4])],
)
def test_every_forward_is_counted_and_the_possible_speedup_follows(model, site, forwards):
    """Mutants: forwards of one branch counted twice, the cached call timed for both."""
    cfg = configured(f"model={model}", "model.num_inference_steps=10", "cache.steps=4", f"cache.site={site}")
    found = speed.measure(cfg)
    assert [found.forwards_uncached, found.computed] == [forwards[0], 4]
    share = 0 if site == "output" else (found.forwards - forwards[1]) / (forwards[0] - forwards[1])
    assert found.forwards == forwards[1] if site == "output" else 0 < share < 0.2
    assert found.cached_s < found.uncached_s and 1 < found.speedup <= found.possible_speedup < 4
    assert 0 < found.forward_s < found.uncached_s / forwards[0] * 1.5
    latent = {"wan21_tiny": 16 * 3 * 8 * 8 * 4, "flux_tiny": 64 * 16 * 4}[model]
    branches = forwards[0] // 10
    assert found.cache_bytes == (branches * latent if site == "output" else 64 * 128 * 4)
    assert any("possible" in value for _, value in speed.shown(found))
    is_solver = site == "output" and model == "flux_tiny"  # Wan's rectifier differs by branch
    assert (found.scheduler_s is not None) == is_solver
    shown = dict(speed.shown(found))
    assert ("the same plan as a scheduler" in shown) == is_solver
    assert found.fitted_s == pytest.approx(found.uncached_s / found.fitted_speedup)  # of one pair
    assert 1.5 < found.fitted_speedup < 4 and "of the 2.500x of its steps" in shown["a fitted scheduler of 4 steps"]


def test_the_same_plan_is_timed_as_a_scheduler(monkeypatch):
    """And so is a fitted one, in turns. Mutants: a scheduler left on the pipeline, run for all steps, or timed with the cache on;
    one order for all pairs, a median of the medians."""
    lengths: list[tuple[str, int]] = []
    seconds: list[float] = []
    timed = speed.generate

    def counting(pipe, kwargs, seed=0):
        lengths.append((type(pipe.scheduler).__name__, kwargs["num_inference_steps"]))
        seconds.append(timed(pipe, kwargs, seed))
        return seconds[-1]

    monkeypatch.setattr(speed, "generate", counting)
    overrides = ("model.num_inference_steps=10", "cache.steps=4", "cache.rectify=false", "speed.pairs=3")
    found = speed.measure(configured("model=flux_tiny", *overrides))
    turn = [("FlowMatchEulerDiscreteScheduler", 10)] * 2 + [("FittedScheduler", 4)] * 2
    assert lengths[1:] == turn + turn[::-1] + turn  # the first is the warm-up
    assert found.scheduler_s < found.uncached_s
    plain, fitted = (np.array([seconds[1:][at] for at in places]) for places in ((0, 7, 8), (3, 4, 11)))
    assert found.fitted_speedup == pytest.approx(np.median(plain / fitted)) and found.fitted_s == np.median(fitted)


def test_the_weights_are_not_the_shipped_ones():
    """Mutant: the embedded folder loaded instead of the architecture."""
    cfg = configured("model=flux_tiny")
    made, shipped = untrained.untrained_pipeline(cfg).transformer, load_pipeline(cfg).transformer
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    assert not torch.allclose(made.proj_out.weight, shipped.proj_out.weight)


def test_the_architecture_is_compiled_as_the_model_would_be():
    """Mutant: `model.compile` read and forgotten, so that the record names what was not timed."""
    blocks = untrained.untrained_pipeline(
        configured("model=flux_tiny", "model.compile=true")
    ).transformer.transformer_blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.parametrize("cache", ["easycache", "fewer_steps", "plan_grid", "none"])
def test_other_caches_are_not_timed_as_if_they_were_planned(cache):
    """Mutant: every cache timed as ERTACache's plan."""
    with pytest.raises(ErtaError, match=f"planned from a calibration .* not cache={cache}"):
        speed.measure(configured("model=flux_tiny", f"cache={cache}"))


@pytest.mark.parametrize(
    ("model", "said"), [("flux_dev", "needs a GPU"), ("wan22_a14b", "is neither"), ("cogvideox_2b", "is neither")]
)
def test_models_that_cannot_be_timed_are_refused(model, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ErtaError, match=said):
        speed.measure(configured(f"model={model}", "cache.speedup=2"))
