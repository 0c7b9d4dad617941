"""What changes the model or its guidance since a calibration is seen before a generation."""

from __future__ import annotations

import pytest
from diffusers import WanPipeline

import erta
from erta.signature import adapters_in_use
from tests.pipelines import CALL, PROMPTS, build_pipe, run


def put_adapter(module, scale: float = 0.8, name: str = "style") -> None:
    """What PEFT's layers hold of their adapters."""
    module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters = (
        {name: scale},
        [name],
        False,
        [],
    )


def layer(pipe):
    return pipe.transformer.blocks[1].attn1.to_q


def rescale(pipe):
    layer(pipe).scaling["style"] = 0.4


def switch_off(pipe):
    layer(pipe).disable_adapters = True


def deactivate(pipe):
    layer(pipe).active_adapters = []


def add(pipe):
    put_adapter(pipe.transformer.blocks[0].attn1.to_q)


@pytest.mark.parametrize("change", [rescale, switch_off, deactivate, add])
def test_adapters_that_changed(change):
    """On installation, and at the next call. Mutants: weights alone compared; scales, switches or places left out."""
    pipe = build_pipe()
    put_adapter(layer(pipe))
    plan = erta.calibrate(pipe, PROMPTS[:1], window=3, **CALL).plan(steps=6)
    assert plan.signature["adapters"].startswith("style × 0.8 (")
    with erta.cached(pipe, plan) as trace:
        run(pipe)
        change(pipe)
        with pytest.raises(erta.SignatureMismatch, match="adapters was 'style × 0.8"):
            run(pipe)
    assert trace.calls == 1
    with pytest.raises(erta.SignatureMismatch, match="adapters was 'style × 0.8"):
        erta.install(pipe, plan)


def test_what_adapters_are_called():
    """Mutants: a merged adapter forgotten; one that is off, or scaled to nothing, named."""
    pipe = build_pipe()
    assert adapters_in_use(pipe.transformer) == "none"
    put_adapter(layer(pipe), 0.0)
    assert adapters_in_use(pipe.transformer) == "none"
    put_adapter(layer(pipe), 0.5)
    layer(pipe).active_adapters, layer(pipe).merged_adapters = [], ["style"]
    assert adapters_in_use(pipe.transformer).startswith("style × 0.5 (")


def test_a_lora_scale_of_the_call():
    """Mutant: only what stands in the layers is compared."""
    pipe = build_pipe()
    call = {**CALL, "attention_kwargs": {"scale": 0.5}}
    plan = erta.calibrate(pipe, PROMPTS[:1], window=3, **call).plan(steps=6)
    with erta.cached(pipe, plan) as trace:
        run(pipe, attention_kwargs={"scale": 0.5})
        for other in (None, {"scale": 0.7}):
            with pytest.raises(erta.SignatureMismatch, match="lora_scale was 0.5"):
                run(pipe, attention_kwargs=other)
    assert trace.calls == 1


class Loose(WanPipeline):
    """Passes its arguments on."""

    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, **kwargs)


def test_guidance_among_further_arguments():
    """Mutant: only named arguments are looked at."""
    pipe = build_pipe()
    pipe.__class__ = Loose
    made = erta.calibrate(pipe, PROMPTS[:1], window=3, **CALL)
    assert made.signature["guidance_scale"] == CALL["guidance_scale"]
    with erta.cached(pipe, made.plan(steps=6)) as trace:
        run(pipe)
        with pytest.raises(erta.SignatureMismatch, match="guidance_scale was 4.0"):
            run(pipe, guidance_scale=2.0)
    assert trace.calls == 1 and type(pipe) is Loose
