"""A fitted scheduler leaves the transformer alone: compiled, offloaded or shared, it makes the same samples."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook

import erta
from tests.pipelines import CALL, PROMPTS, build_pipe, run

COUNT = 3
ON_STEPS = {"num_inference_steps": COUNT}


@pytest.fixture(scope="module")
def fitted():
    """By number of steps, a fitted scheduler of the tiny random pipeline."""
    pipe = build_pipe()
    seen = erta.record(pipe, PROMPTS, decode=False, **CALL)
    options = erta.FitOptions(terms=4, ridge=1e-6, validate=False)
    return {steps: erta.fit(pipe, seen, steps=steps, options=options) for steps in (COUNT, 5)}


def given(scheduler: erta.FittedScheduler, tmp_path, transformer=None):
    """A pipeline with a copy of the scheduler, as one loads it."""
    pipe = build_pipe()
    pipe.transformer = transformer or pipe.transformer
    scheduler.save_pretrained(tmp_path / "solver")
    pipe.scheduler = erta.FittedScheduler.from_pretrained(tmp_path / "solver", pipe=pipe)
    return pipe


def forwards_of(transformer: torch.nn.Module) -> list[int]:
    """Grows by one entry a forward."""
    made: list[int] = []
    transformer.register_forward_hook(lambda *_: made.append(1))
    return made


BACKENDS = [
    "eager",
    pytest.param(
        "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")]
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_blocks(fitted, tmp_path, backend):
    """To the tolerance of the compiler, K forwards a branch, and each block is compiled. Mutants: a state on the transformer, a
    step that goes around the blocks."""
    pipe = given(fitted[COUNT], tmp_path)
    plain = run(pipe, **ON_STEPS)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    made, graphs = forwards_of(pipe.transformer), torch._dynamo.utils.counters["stats"]
    compiled = run(pipe, **ON_STEPS)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    assert len(made) == 2 * COUNT and graphs["unique_graphs"] >= 1
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert torch.equal(run(pipe, **ON_STEPS), compiled)  # nothing is left over from one run to the next
    torch._dynamo.reset()


def test_offload_hooks(fitted, tmp_path):
    """As `enable_model_cpu_offload` hooks each model, with the CPU as the device that it runs on. Mutants: a history that holds
    on to a model, a scheduler that asks the transformer for its weights."""
    pipe = given(fitted[COUNT], tmp_path)
    plain = run(pipe, **ON_STEPS)
    hook, loads = None, []
    for name in ("text_encoder", "transformer", "vae"):
        model, hook = cpu_offload_with_hook(getattr(pipe, name), torch.device("cpu"), hook)
        pre_forward = model._hf_hook.pre_forward
        model._hf_hook.pre_forward = lambda *args, at=name, own=pre_forward, **kw: (loads.append(at), own(*args, **kw))[
            1
        ]
    assert torch.equal(run(pipe, **ON_STEPS), plain)
    assert loads.count("transformer") == 2 * COUNT and loads.count("text_encoder") >= 1
    hook.offload()
    assert torch.equal(run(pipe, **ON_STEPS), plain)


def test_sequential_offload(fitted, tmp_path):
    """Weights on the meta device between forwards. Mutant: the model checked by weights that are not there."""
    pipe = given(fitted[COUNT], tmp_path)
    plain = run(pipe, **ON_STEPS)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).device.type == "meta"
    assert torch.equal(run(pipe, **ON_STEPS), plain)


def test_two_pipelines_on_one_transformer_in_two_threads(fitted, tmp_path):
    """Fitted solvers of different length, each as if it were alone. Mutants: history on the class, a state on the transformer."""
    shared = build_pipe().transformer
    pipes = {steps: given(one, tmp_path / str(steps), shared) for steps, one in fitted.items()}
    alone = {steps: run(pipe, PROMPTS[1], num_inference_steps=steps) for steps, pipe in pipes.items()}
    assert not torch.allclose(alone[COUNT], alone[5], atol=1e-3)
    found: dict[int, torch.Tensor] = {}

    def work(steps: int) -> None:
        found[steps] = run(pipes[steps], PROMPTS[1], num_inference_steps=steps)

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(steps,)) for steps in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found.pop(steps), alone[steps]) for steps in pipes)
