"""Which part of an output is a guidance branch's, and which part the solver is given."""

from __future__ import annotations

import pytest
import torch

import erta
from erta.architectures import Architecture
from erta.guidance import branches_of, given_part, unnamed_context, weights_of
from erta.scheduler import nominal_sigmas
from erta.site import OutputSite
from tests.erta.matrix import ROWS, uncached
from tests.pipelines import euler


def row(name: str):
    return next(one for one in ROWS if one.pipeline == name)


def test_what_a_forward_without_a_name_is_called():
    """Mutants: a batch of three taken for one branch; a plan's layout not compared; a fourth forward let through."""
    assert [unnamed_context(place, 2, 2, None) for place in range(3)] == ["single", "second call", "third call"]
    assert unnamed_context(0, 4, 2, None) == "both halves" and unnamed_context(0, 6, 2, None) == "three thirds"
    thirds = branches_of("three thirds", 4.0)
    assert len(thirds) == 3 and unnamed_context(0, 6, 2, thirds) == "three thirds"
    with pytest.raises(erta.ErtaError, match="forward 4 of one step"):
        unnamed_context(3, 2, 2, None)
    with pytest.raises(erta.ErtaError, match="forward 2 of one step"):
        unnamed_context(1, 6, 2, None)
    with pytest.raises(erta.ErtaError, match="1 sample gave a batch of 4"):
        unnamed_context(0, 4, 1, None)
    for rows in (2, 4):
        with pytest.raises(erta.SignatureMismatch, match="3 branches, 6 rows"):
            unnamed_context(0, rows, 2, thirds)


def test_where_the_solver_s_part_lies():
    """Mutants: references behind taken for the picture; a frame that is kept counted; appended channels in the way."""
    x, v = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    assert given_part(x, v, x) is None
    for start in (0, 2):
        part = given_part(x, v, x[:1, start : start + 4])
        assert part is not None and torch.equal(part.of(v), v[:, start : start + 4])
    video, made = torch.randn(1, 3, 4, 4, 9), torch.randn(1, 3, 4, 4, 4)  # frames first, channels last
    part = given_part(video, made, video[:, 1:, :, :, :4])
    assert part is not None and torch.equal(part.of(made), made[:, 1:])
    assert given_part(video, made, torch.randn(1, 3, 4, 4, 4)) is None  # channels that the output has not either


def test_statistics_are_of_the_solver_s_part():
    """FLUX Kontext, whose references lie behind: by hand from the stored outputs. Mutant: the references counted too."""
    pipe, call = row("FluxKontextPipeline").build(guided=False)
    seen = []
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    made = erta.calibrate(pipe, window=2, **call)
    shape = uncached(pipe, call).shape[1]
    (x_old, v_old), (x, v) = ([value[:, :shape] for value in forward] for forward in (seen[2], seen[3]))
    old, new = v_old - x_old, v - x
    assert seen[0][0].shape[1] == 2 * shape and made.rel_l1()[3, 0] == pytest.approx(
        float((old - new).abs().sum() / new.abs().sum()), rel=1e-4
    )
    assert made.statistics.phi_ratio.mean[0, 3, 0] == pytest.approx(
        float((x + old - v).abs().sum() / v.abs().sum()), rel=1e-4
    )
    plan = made.plan(steps=3)
    with pytest.raises(erta.ErtaError, match="a part of what the transformer makes"):
        erta.decompose(pipe, plan, None, **call)


def test_references_before_the_latent_are_no_part_of_it():
    """Klein KV's first step. Mutants: the whole input compared with the plan's size; the residual of the wrong tokens."""
    site = OutputSite(Architecture("any", references_before="num_ref_tokens"))
    x, v = torch.randn(1, 6, 8), torch.randn(1, 4, 8)
    _, residual = site.compute(lambda *args, **kwargs: (v,), (), {"hidden_states": x, "num_ref_tokens": 2})
    assert torch.equal(residual, v - x[:, 2:])
    later = torch.randn(1, 4, 8)
    assert torch.equal(site.predict(lambda: None, (), {"hidden_states": later}, residual), later + residual)
    pipe, call = row("Flux2KleinKVPipeline").build()
    made = erta.calibrate(pipe, window=2, **call)
    plain = uncached(pipe, call)
    with erta.cached(pipe, made.plan(steps=6)):
        assert torch.equal(uncached(pipe, call), plain)
    with erta.cached(pipe, made.plan(steps=3)) as trace:
        assert not torch.equal(uncached(pipe, call), plain) and trace.forwards == {"single": 3}


def test_frames_that_a_pipeline_sets_itself_are_left_out():
    """Cosmos 2.5 gives the solver known frames as they are. Mutant: weighed with the others, so that nothing fits."""
    first, second, known = torch.randn(3, 1, 4, 3, 8, 8)
    made = 5 * first - 4 * second
    made[:, :, 0] = 10 * known[:, :, 0]
    values = {"single": first, "second call": second}
    assert weights_of(values, made) == pytest.approx((5.0, -4.0), abs=1e-5)
    assert weights_of(values, 10 * known) is None


def test_three_branches_in_one_batch():
    """Guidance by perturbed attention. Mutants: weights of two; the third branch's residual for another's."""
    pipe, call = row("StableDiffusion3PAGPipeline").build()
    made = erta.calibrate(pipe, window=5, **call)
    assert made.signature["branches"] == ["first third", "second third", "last third"]
    plain = uncached(pipe, call)
    with erta.cached(pipe, made.plan(steps=3)) as trace:
        cached = uncached(pipe, call)
    assert trace.forwards == {"three thirds": 3} and 0 < (cached - plain).abs().mean() < plain.abs().mean()
    with pytest.raises(erta.ErtaError, match="does not name its guidance branches"):
        erta.decompose(pipe, made.plan(steps=3), None, **call)


def test_a_grid_is_a_copy():
    """Some pipelines write into their scheduler's (Cosmos 2). Mutant: the record of a calibration changes with it."""
    scheduler = euler()
    scheduler.set_timesteps(4)
    before = nominal_sigmas(scheduler)
    scheduler.sigmas[-1] = 7.0
    assert before[-1] == 0.0 and nominal_sigmas(scheduler)[-1] == 7.0
