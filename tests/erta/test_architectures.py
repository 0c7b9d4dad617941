"""One entry a transformer class: with it, every part of the library and of the harness knows the class."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from omegaconf import OmegaConf

import erta
from erta import architectures
from erta.architectures import ARCHITECTURES, Architecture, BlockStack, CallSizes, architecture_of
from erta.online import Call
from erta.policy import sources
from experiments.harness.setup import Setup
from experiments.methods.common.modules import components_of
from experiments.methods.delta_dit import arm as delta_dit
from experiments.methods.teacache import modulated_input
from experiments.models.architectures import PUBLISHED, known_class
from experiments.models.costs import flops_without_blocks
from tests.commands import config
from tests.pipelines import CALL, PROMPTS, STEPS, build_pipe, run


class MadeUpTransformer(WanTransformer3DModel):
    """A class that nobody knows."""


def made_up_pipe():
    pipe = build_pipe()
    pipe.transformer.__class__ = MadeUpTransformer
    return pipe


ENTRY = Architecture(
    "MadeUpTransformer",
    blocks=BlockStack(("blocks",)),
    components={"attention": r"blocks\.\d+\.attn1"},
    self_attention=r"^blocks\.\d+\.attn1$",
    signal=lambda transformer, kwargs: kwargs["timestep"].float(),
    inputs=lambda sizes, config: {"extra": torch.ones(sizes.text[0])},
)


def test_without_an_entry_only_the_output_is_known():
    """Mutant: the class's parents looked up, so that a changed forward passes for the known one."""
    pipe = made_up_pipe()
    with pytest.raises(
        erta.InstallError,
        match="does not know the blocks of MadeUpTransformer .* add an entry to erta/architectures.py",
    ):
        erta.calibrate(pipe, PROMPTS[:1], site="blocks", **CALL)
    with pytest.raises(erta.ErtaError, match="modules of MadeUpTransformer are not known"):
        components_of(pipe.transformer)
    assert erta.calibrate(pipe, PROMPTS[:1], window=3, **CALL).plan(steps=6).num_computed == 6


def test_one_entry_makes_a_class_known_everywhere(monkeypatch):
    """Mutant: a table of classes anywhere else."""
    monkeypatch.setitem(architectures.ARCHITECTURES, "MadeUpTransformer", ENTRY)
    pipe = made_up_pipe()
    plan = erta.calibrate(pipe, PROMPTS[:1], site="blocks", window=3, **CALL).plan(steps=6)
    with erta.cached(pipe, plan) as trace:
        pipe(prompt=PROMPTS[0], output_type="latent", **CALL)
    assert trace.executed and plan.site == "blocks"
    assert len(components_of(pipe.transformer)["attention"]) == 2
    call = Call(0, 1, "cond", torch.zeros(1), pipe.transformer, (), {"timestep": torch.tensor([7])})
    assert modulated_input(call).tolist() == [7.0]
    shape = [f"model.{key}={value}" for key, value in CALL.items()]
    cfg = config("cache=delta_dit", "cache.options.interval=2", "cache.site=blocks", *shape)
    setup = Setup(cfg, pipe)
    assert delta_dit(setup).report == {"knob": "interval", "value": 2} and 0 < setup.reuse_share() < 1
    assert known_class({"class": "MadeUpTransformer"}) is ENTRY
    inputs = ENTRY.call_inputs(CallSizes(2, 8, 8, 16, (5, 24)), None)
    assert inputs["hidden_states"].shape == (1, 16, 2, 8, 8) and inputs["extra"].shape == (5,)
    with torch.device("meta"):
        bare = MadeUpTransformer(num_layers=2)
        sizes = ENTRY.call_inputs(CallSizes(1, 8, 8, 16, (5, 4096)), None)
    del sizes["extra"]
    assert flops_without_blocks(bare, sizes) > 0 and len(bare.blocks) == 0


class WithSound(WanTransformer3DModel):
    """Gives a second output beside the velocity, as LTX-2 gives the sound's."""

    def forward(self, *args, **kwargs):
        velocity = super().forward(*args, **kwargs)[0]
        return velocity, velocity.flatten(2).mean(2)


def test_a_second_output_is_repeated(monkeypatch):
    """As it was at the last computed step, branch by branch, and counted as cache. Mutants: left out; the other branch's."""
    pipe, seen = build_pipe(), []
    pipe.transformer.__class__ = WithSound
    monkeypatch.setitem(ARCHITECTURES, "WithSound", Architecture("WithSound", beside_velocity="output"))
    plain = run(pipe)
    calibration = erta.calibrate(pipe, PROMPTS[:1], window=6, **CALL)
    with erta.cached(pipe, calibration.plan(steps=STEPS)):
        assert torch.equal(run(pipe), plain)
    pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output))
    plan = calibration.plan(steps=4)
    with erta.cached(pipe, plan) as trace:
        latents = run(pipe)
    for step, source in enumerate(sources(plan.mask)):
        for branch in range(2):
            assert torch.equal(seen[2 * step + branch][1], seen[2 * source + branch][1])
            assert source == step or not torch.equal(seen[2 * step + branch][0], seen[2 * source + branch][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    assert trace.cache_bytes == 2 * 4 * (latents.numel() + seen[0][1].numel())


def test_channels_of_packed_and_unpacked_latents():
    """Mutant: CogVideoX's channels looked for at axis 1."""
    cog, flux = ARCHITECTURES["CogVideoXTransformer3DModel"], ARCHITECTURES["FluxTransformer2DModel"]
    assert cog.channel_axis_of(torch.empty(1, 3, 4, 8, 8)) == 2 and flux.channel_axis_of(torch.empty(1, 9, 4)) == 2
    assert cog.call_inputs(CallSizes(3, 8, 8, 4, (5, 6)), None)["hidden_states"].shape == (1, 3, 4, 8, 8)
    assert architecture_of(torch.nn.Linear(1, 1)).channel_axis_of(torch.empty(1, 4, 8, 8)) == 1


def test_published_sizes_are_those_of_their_classes():
    """Every model of the file is named by the entry of its class, and no entry names another."""
    known = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    named = {model: entry.name for entry in ARCHITECTURES.values() for model in entry.published}
    assert named == {model: about["class"] for model, about in known.items()}
