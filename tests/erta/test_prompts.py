"""Prompts as text and as embeddings, one sample each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import erta
from erta.prompts import single_calls
from tests.pipelines import CALL, PROMPTS, build_pipe

GUIDED = {key: value for key, value in CALL.items() if key != "max_sequence_length"}


def encoded(pipe, prompts):
    with torch.no_grad():
        return pipe.encode_prompt(prompts, max_sequence_length=CALL["max_sequence_length"])


def test_embeddings_calibrate_as_their_texts_do():
    """A batch of embeddings is so many prompts. Mutants: the batch run as one call; negatives of another row."""
    pipe = build_pipe()
    texts = erta.calibrate(pipe, PROMPTS, window=3, **CALL)
    positive, negative = encoded(pipe, PROMPTS)
    made = erta.calibrate(pipe, prompt_embeds=positive, negative_prompt_embeds=negative, window=3, **GUIDED)
    for name, array in texts.statistics.to_arrays().items():
        np.testing.assert_allclose(made.statistics.to_arrays()[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    assert len(set(made.record["prompts"])) == 2 and made.record["prompts"][0].startswith("embedding ")
    with erta.cached(pipe, made.plan(steps=5)) as trace:
        pipe(prompt_embeds=positive[:1], negative_prompt_embeds=negative[:1], output_type="latent", **GUIDED)
    assert trace.forwards == {"cond": 5, "uncond": 5}


def test_a_text_is_one_prompt():
    """Mutant: a string read as a list of letters."""
    pipe = build_pipe()
    made = [
        erta.calibrate(pipe, PROMPTS[0], window=2, **CALL),
        erta.calibrate(pipe, window=2, prompt=PROMPTS[0], **CALL),
    ]
    assert [one.record["prompts"] for one in made] == [[PROMPTS[0]]] * 2
    plan = erta.refit(pipe, made[0].plan(steps=5), PROMPTS[0], **CALL)
    assert plan.report["rectifier"] == "channel, linear, closed loop"


def test_rows_go_together():
    """Mutants: a list left whole; what is not of the prompts cut."""
    image = torch.zeros(2, 3, 8, 8)
    given = {"prompt_embeds": [torch.zeros(4, 8), torch.ones(6, 8)], "negative_prompt_embeds": torch.ones(1, 4, 8)}
    given |= {"prompt_attention_mask": torch.tensor([[1, 0], [1, 1]]), "image": image, "guidance_scale": 3.0}
    (first, one), (second, two) = single_calls(None, given)
    assert first != second and [len(call["prompt_embeds"]) for call in (one, two)] == [1, 1]
    assert torch.equal(two["prompt_embeds"][0], torch.ones(6, 8)) and two["prompt_attention_mask"].tolist() == [[1, 1]]
    assert two["image"] is image and two["negative_prompt_embeds"].shape == (1, 4, 8) and two["guidance_scale"] == 3.0


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        (None, {}, "give texts, or prompt_embeds="),
        (PROMPTS, {"prompt_embeds": torch.zeros(1, 4, 8)}, "not both"),
        (PROMPTS, {"prompt": PROMPTS[0]}, "give the prompts once"),
        ([PROMPTS], {}, "a prompt is a text, not list"),
        (PROMPTS, {"num_videos_per_prompt": 2}, "one sample per prompt, without num_videos_per_prompt"),
        (PROMPTS, {"num_images_per_prompt": 4, "num_videos_per_prompt": 1}, "without num_images_per_prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(pipe, prompts, changes, message):
    """In one line, before anything runs. Mutant: the first of two such arguments looked at alone."""
    forwards = []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(erta.ErtaError, match=message) as caught:
        erta.calibrate(pipe, prompts, **changes, **CALL)
    assert not forwards and len(str(caught.value).splitlines()) == 1
