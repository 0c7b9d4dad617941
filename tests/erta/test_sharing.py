"""Whose call it is: a cache answers the calls of its own pipeline object, and leaving takes off only what is ours."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from diffusers import WanPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from torch import nn

import erta
from erta.online import OnlineRule, online
from erta.pipeline import leaving, session_of
from tests.pipelines import CALL, PROMPTS, STEPS, bare_plan, build_pipe, euler, run, unipc


class Boom(Exception):
    """The user's own."""


class EverySecond(OnlineRule):
    """Computes every second step."""

    def begin(self, num_steps):
        pass

    def should_compute(self, call):
        return call.step % 2 == 0

    def computed(self, call, velocity, residual):
        pass


def abort(pipe, step, timestep, values):
    if step == 3:
        raise Boom
    return {}


def abort_early(pipe, step, timestep, values):
    if step == 1:
        raise Boom
    return {}


def beside(pipe: WanPipeline, **changes) -> WanPipeline:
    """Another pipeline object of the same components."""
    other = type(pipe)(**{**pipe.components, **changes})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_others_that_share_the_transformer_get_the_plain_forward(site):
    """During a cached call, after one, and after an aborted one: bit for bit, for objects made at any time.

    Mutants: the hook answers whoever calls; state of an aborted call kept; a rebuilt pipeline takes over session or scheduler.
    """
    pipe = build_pipe()
    plan, before = bare_plan(pipe, site=site), beside(pipe)
    plain, own = run(before), pipe.scheduler
    with erta.cached(pipe, plan) as trace:
        cached = run(pipe)
        assert not torch.equal(cached, plain) and torch.equal(run(before), plain)
        with pytest.raises(Boom):
            run(pipe, callback_on_step_end=abort)
        inside, shallow = beside(pipe), copy.copy(pipe)
        assert (
            type(inside) is WanPipeline and inside.scheduler is pipe.scheduler is own and type(pipe) is not WanPipeline
        )
        for other in (before, inside, shallow, WanPipeline(**{**pipe.components, "scheduler": pipe.scheduler})):
            other.set_progress_bar_config(disable=True)
            assert torch.equal(run(other), plain)
        assert trace.calls == 1 and torch.equal(run(pipe), cached) and trace.calls == 2
    assert torch.equal(run(pipe), plain) and torch.equal(run(inside), plain) and type(pipe) is WanPipeline


def test_a_callback_is_the_users_own():
    """What it runs is plain, on the pipeline's own scheduler, and does not disturb the call that it interrupts.

    Mutants: a forward by hand taken for a step; another pipeline's end resets the state; the planned scheduler handed out.
    """
    pipe = build_pipe()
    plan, plain, seen = bare_plan(pipe), run(pipe), []
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": pipe.encode_prompt(PROMPTS[0], max_sequence_length=16)[0],
    }
    with torch.no_grad():
        by_hand = pipe.transformer(**inputs).sample

    def look(pipe, step, timestep, values):
        assert pipe.scheduler.step_index == step + 1  # of this call
        if step in (2, 4):
            with torch.no_grad():
                seen.append(torch.equal(pipe.transformer(**inputs).sample, by_hand))
            other = beside(pipe)
            assert other.scheduler is not pipe.scheduler
            seen.append(torch.equal(run(other), plain))
        return {}

    class Official(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return look(pipeline, step_index, timestep, callback_kwargs)

    with erta.cached(pipe, plan) as trace:
        cached = run(pipe)
        for callback in (look, Official()):
            assert torch.equal(run(pipe, callback_on_step_end=callback), cached)
    assert seen == [True] * 8 and trace.forwards == {"cond": 4, "uncond": 4} and not torch.equal(cached, plain)


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_each_with_a_plan_of_its_own(site):
    """Two pipelines of one transformer, an online cache and a calibration beside them. Mutants: one state, one plan for all."""
    first = build_pipe()
    second, third = beside(first, scheduler=euler()), beside(first)
    plans = [bare_plan(first, site=site), bare_plan(second, (True, False) * 4, site=site)]
    alone, calibration = [], erta.calibrate(third, PROMPTS[:1], window=2, site=site, **CALL)
    for pipe, plan in zip((first, second), plans, strict=True):
        with erta.cached(pipe, plan):
            alone.append(run(pipe))
    rule = EverySecond()
    with online(third, rule, site):
        decided = run(third)
    with erta.cached(first, plans[0]) as trace:
        with erta.cached(second, plans[1]), online(third, rule, site):
            for _ in range(2):
                assert torch.equal(run(first), alone[0]) and torch.equal(run(second), alone[1])
                assert torch.equal(run(third), decided)
            erta.uninstall(first)  # in another order than they were put on
            assert torch.equal(run(second), alone[1])
        again = erta.calibrate(third, PROMPTS[:1], window=2, site=site, **CALL)
    assert trace.calls == 2 and not torch.equal(alone[0], alone[1])
    assert (again.rel_l1()[1:, 0] == calibration.rel_l1()[1:, 0]).all()
    assert "forward" not in first.transformer.__dict__


class Trio:
    """Three pipelines of one transformer, two of them with a plan, and what each gives alone: plain and planned."""

    def __init__(self, masks: list[tuple[bool, ...]], site: str) -> None:
        self.first = build_pipe(layers=1)
        self.pipes = [self.first, beside(self.first, scheduler=euler()), beside(self.first, scheduler=unipc())]
        self.call = {"num_inference_steps": len(masks[0]), "height": 16, "width": 16, "num_frames": 1}
        for name, prompt in (("prompt_embeds", PROMPTS[0]), ("negative_prompt_embeds", PROMPTS[1])):
            self.call[name] = self.first.encode_prompt(prompt, max_sequence_length=16)[0]
        self.plain = [self.generate(pipe) for pipe in self.pipes]
        self.plans = [bare_plan(pipe, mask, site=site) for pipe, mask in zip(self.pipes, masks, strict=False)]
        self.planned = []
        for pipe, plan in zip(self.pipes, self.plans, strict=False):
            with erta.cached(pipe, plan):
                self.planned.append(self.generate(pipe))
        self.wrong: list[str] = []

    def generate(self, pipe, **changes):
        return run(pipe, None, **self.call, **changes)

    def in_threads(self, rounds: int, one_round: Callable[[int, int], None]) -> None:
        """`one_round(index, count)` for each pipeline in a thread of its own; nothing may be wrong, or raised."""

        def work(index: int) -> None:
            for count in range(rounds):
                try:
                    one_round(index, count)
                except (Exception, pytest.fail.Exception) as error:
                    self.wrong.append(f"{index}, round {count}: {error!r}")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(self.pipes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not self.wrong
        assert all(not torch.equal(one, other) for one, other in zip(self.planned, self.plain, strict=False))

    def expect(self, index: int, count: int, wanted: torch.Tensor) -> None:
        """What a pipeline gives now is that."""
        if not torch.equal(self.generate(self.pipes[index]), wanted):
            self.wrong.append(f"{index}, round {count}: another tensor")


def in_threads(rounds: int, site: str) -> None:
    """Two with plans all the time; every third call is aborted on the way."""
    trio = Trio([(True, False, True), (True, False, False)], site)
    expected = [*trio.planned, trio.plain[2]]

    def one_round(index: int, count: int) -> None:
        if count % 3 == index:
            with pytest.raises(Boom):
                trio.generate(trio.pipes[index], callback_on_step_end=abort_early)
        else:
            trio.expect(index, count, expected[index])

    with erta.cached(trio.pipes[0], trio.plans[0]), erta.cached(trio.pipes[1], trio.plans[1]):
        trio.in_threads(rounds, one_round)
    assert all(torch.equal(trio.generate(pipe), one) for pipe, one in zip(trio.pipes, trio.plain, strict=True))


@pytest.mark.parametrize("site", ["output", "blocks"])
def test_in_threads(site):
    """Mutants: a cache context for all threads; blocks exchanged under another thread's forward."""
    in_threads(4, site)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["output", "blocks"])
def test_in_threads_for_long(site):
    """200 rounds without one wrong tensor. Mutants: those of the short one, in their rarer moments."""
    in_threads(200, site)


def test_one_pipeline_in_two_threads_is_refused():
    """Mutant: two calls of one pipeline object share its planned scheduler."""
    pipe, refused = build_pipe(), []

    def look(pipe, step, timestep, values):
        def again():
            try:
                run(pipe)
            except erta.InstallError as error:
                refused.append(str(error))

        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        return {}

    plain, plan = run(pipe), bare_plan(pipe)
    with erta.cached(pipe, plan):
        cached = run(pipe)
        assert torch.equal(run(pipe, callback_on_step_end=look), cached)
    assert len(refused) == STEPS and "one call at a time" in refused[0]
    assert torch.equal(run(pipe), plain)


def test_what_the_user_changes_inside_stays():
    """Another scheduler, a setting of the one that is there. Mutants: the old one put back; a copy made once and kept."""
    pipe = build_pipe()
    plan, own, other = bare_plan(pipe), pipe.scheduler, unipc()
    with erta.cached(pipe, plan):
        cached = run(pipe)
        pipe.scheduler = other
        assert torch.equal(run(pipe), cached) and pipe.scheduler is other
        other.register_to_config(flow_shift=3.0)
        with pytest.raises(erta.SignatureMismatch, match="sigmas"):
            run(pipe)
        pipe.scheduler = own
        assert torch.equal(run(pipe), cached)
        pipe.scheduler = other
    assert pipe.scheduler is other and pipe.components["scheduler"] is other
    made = erta.calibrate(build_pipe(), PROMPTS[:1], window=2, **CALL).plan(steps=6)
    pipe = build_pipe()
    with erta.cached(pipe, made):
        pipe.scheduler = euler()
        with pytest.raises(erta.SignatureMismatch, match="scheduler was"):
            run(pipe)


class Counting(ModelHook):
    """A hook of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def pre_forward(self, module, *args, **kwargs):
        self.count += 1
        return args, kwargs


@pytest.mark.parametrize("replaces_forward", [False, True])
def test_a_hook_on_top_of_ours_stays(replaces_forward):
    """Leaving takes ours from below it. Mutants: refused; the one on top lost, or ours brought back when it goes."""
    pipe, hook = build_pipe(), Counting()
    plan, plain = bare_plan(pipe), run(pipe)
    if replaces_forward:
        hook.new_forward = lambda module, *args, **kwargs: hook.fn_ref.original_forward(*args, **kwargs)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    with erta.cached(pipe, plan) as trace:
        cached = run(pipe)
        registry.register_hook(hook, "foreign")
        assert torch.equal(run(pipe), cached) and trace.calls == 2
    assert hook.count == 2 * STEPS and torch.equal(run(pipe), plain) and hook.count == 4 * STEPS
    assert list(registry.hooks) == ["foreign"]
    with erta.cached(pipe, plan):
        assert torch.equal(run(pipe), cached)
    registry.remove_hook("foreign", recurse=False)
    assert torch.equal(run(pipe), plain) and trace.calls == 2


def test_a_wrapper_that_nobody_knows_stays_too():
    """Ours stays below it and does nothing. Mutant: the wrapper thrown away, or a forward without a session answered."""
    pipe, calls = build_pipe(), []
    plan, plain = bare_plan(pipe), run(pipe)
    with erta.cached(pipe, plan):
        inner = pipe.transformer.forward
        pipe.transformer.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
        cached = run(pipe)
    assert torch.equal(run(pipe), plain) and len(calls) == 4 * STEPS
    with erta.cached(pipe, plan):
        assert torch.equal(run(pipe), cached)
    del pipe.transformer.forward
    assert torch.equal(run(pipe), plain)


def test_an_exception_of_the_users_is_never_replaced():
    """Mutant: what is wrong with leaving is raised in its place."""
    pipe = build_pipe()

    def leave(pipe, step, timestep, values):
        with pytest.raises(erta.InstallError, match="still running"):
            erta.uninstall(pipe)
        with leaving(lambda: erta.uninstall(pipe)):
            raise Boom

    with pytest.raises(Boom) as caught, erta.cached(pipe, bare_plan(pipe)):
        run(pipe, callback_on_step_end=leave)
    assert "still running" in caught.value.__notes__[0] and session_of(pipe) is None


def test_uninstall_by_the_transformer():
    """Whatever holds it, also a pipeline that is gone. Mutants: only the last session; the pipeline keeps its session."""
    pipe = build_pipe()
    other, plan, plain = beside(pipe), bare_plan(pipe), run(pipe)
    transformer = pipe.transformer
    for one in (pipe, other):
        erta.install(one, plan)
    erta.uninstall(transformer)
    erta.uninstall(transformer)
    assert "forward" not in transformer.__dict__ and HookRegistry.check_if_exists_or_initialize(transformer).hooks == {}
    assert session_of(pipe) is session_of(other) is None and type(pipe) is WanPipeline
    gone = beside(pipe)
    erta.install(gone, plan)
    del gone
    assert torch.equal(run(pipe), plain) and "forward" in transformer.__dict__
    erta.uninstall(transformer)
    assert "forward" not in transformer.__dict__


def exchange(pipe):
    pipe.transformer = build_pipe().transformer


def quantise(pipe):
    for block in pipe.transformer.blocks:
        weight = block.attn1.to_q.weight.detach()
        block.attn1.to_q.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange, "another transformer"),
        (lambda pipe: pipe.transformer.compile(), "compile_repeated_blocks"),
        (lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer)), "compile_repeated_blocks"),
        (quantise, r"blocks.0.attn1.to_q.weight is of another kind"),
        (lambda pipe: pipe.transformer.to("meta"), "meta device and has no values"),
        (lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1)), "disable_cache"),
        (lambda pipe: setattr(pipe, "transformer", None), "no transformer"),
    ],
)
def test_a_changed_transformer_is_noticed_before_the_next_call(change, message):
    """In one line and before the first forward. Mutants: looked at on installation only; noticed at the end of the call."""
    pipe, forwards = build_pipe(), []
    erta.install(pipe, bare_plan(pipe))
    run(pipe)
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    change(pipe)
    with pytest.raises(erta.InstallError, match=message) as caught:
        run(pipe)
    assert not forwards and len(str(caught.value).splitlines()) == 1
    erta.uninstall(pipe)
    assert session_of(pipe) is None and type(pipe) is WanPipeline


def test_entered_twice():
    """Refused while it is on, and as good as new afterwards. Mutant: the inner exit takes off the outer one's cache."""
    pipe = build_pipe()
    plan, plain = bare_plan(pipe), run(pipe)
    once = erta.cached(pipe, plan)
    with once as trace:
        with pytest.raises(erta.InstallError, match="already"), once:
            pass
        with pytest.raises(erta.InstallError, match="already"), erta.cached(pipe, plan):
            pass
        cached = run(pipe)
        assert trace.calls == 1
    with once as trace:
        assert torch.equal(run(pipe), cached) and trace.calls == 1
    assert torch.equal(run(pipe), plain)


def test_offload_put_on_and_off_inside():
    """Accelerate's hook on top of ours, over calls and after leaving. Mutant: leaving refused, or accelerate's hook lost."""
    pipe = build_pipe()
    plan, plain = bare_plan(pipe), run(pipe)
    with erta.cached(pipe, plan) as trace:
        cached = run(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(run(pipe), cached) and torch.equal(run(pipe), cached) and trace.calls == 3
    assert hasattr(pipe.transformer, "_hf_hook") and torch.equal(run(pipe), plain)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), plain) and HookRegistry.check_if_exists_or_initialize(pipe.transformer).hooks == {}
