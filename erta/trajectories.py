"""Uncached trajectories as the scheduler sees them: latents and guided outputs at a sample of positions.

Solvers are fitted to them (`erta.fit`). Nothing touches the transformer, so this knows no guidance branches and works on every
pipeline whose scheduler integrates over sigmas.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erta.architectures import architecture_of
from erta.errors import ErtaError, NonFiniteError
from erta.files import save_arrays
from erta.guidance import guidance_scale_of, second_scale_of
from erta.loading import Fields, arrays_of, check_array
from erta.pipeline import Session, call_arguments, check_bare, find_denoiser, leaving, takeover_step
from erta.scheduler import ShowResult, check_one_forward_a_step, first_index, nominal_sigmas
from erta.signature import argument_signature, check_signature, model_signature
from erta.trace import UncheckedTrace

SCHEMA = "erta.trajectories/1"
POSITIONS = 4096  # of a latent that are kept; see `erta.record`
SHOWN = 16384  # values of a decoded sample that are kept


@dataclass(frozen=True)
class Trajectories:
    """Uncached runs of P prompts over N steps, at M sampled positions of the latent.

    Attributes:
        latents: float32 (P, N + 1, M), the last one the result.
        outputs: guided outputs, float32 (P, N, M).
        positions: which entries of the flat latent, (M,).
        channels: the channel of each position, (M,).
        decoded: what the pipeline made of the result, in [0, 1], at Q sampled values, float32 (P, Q); Q = 0: not decoded.
        signature: what they were made for, as in `Calibration`.
        record: how: prompts, seeds, seconds, the call's arguments.
    """

    latents: np.ndarray
    outputs: np.ndarray
    positions: np.ndarray
    channels: np.ndarray
    decoded: np.ndarray
    signature: dict[str, Any]
    record: dict[str, Any]

    @property
    def num_steps(self) -> int:
        return self.outputs.shape[1]

    @property
    def num_prompts(self) -> int:
        return len(self.outputs)

    @property
    def sigmas(self) -> np.ndarray:
        """The nominal grid, float32 (N + 1,)."""
        return np.array(self.signature["sigmas"], np.float32)

    def only(self, prompts: Sequence[int]) -> Trajectories:
        """Those of some prompts."""
        chosen = list(prompts)
        record = {**self.record, **{key: [self.record[key][one] for one in chosen] for key in ("prompts", "seeds")}}
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in ("latents", "outputs", "decoded")}
        return replace(self, **arrays, record=record)

    def merge(self, other: Trajectories) -> Trajectories:
        """Both sets of prompts; raises SignatureMismatch if they are not of one setup."""
        check_signature(self.signature, other.signature)
        if not np.array_equal(self.positions, other.positions) or self.decoded.shape[1] != other.decoded.shape[1]:
            raise ErtaError("trajectories of different positions cannot be merged: record them with the same settings")
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("latents", "outputs", "decoded")
        }
        record = {
            **self.record,
            **{key: self.record[key] + other.record[key] for key in ("prompts", "seeds", "skipped", "seconds")},
        }
        return replace(self, **arrays, record=record)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: P (2 N + 1) M floats, 26 MB for 16 prompts of 50 steps."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        save_arrays(path, arrays, SCHEMA, signature=self.signature, record=self.record)

    @classmethod
    def load(cls, path: str | Path) -> Trajectories:
        """Read trajectories; raises ErtaError if the file is missing, truncated or something else."""
        with arrays_of(path, "trajectories", (SCHEMA,), "Record them again.") as (arrays, said):
            found = cls(**{name: arrays[name] for name in ARRAYS}, signature=said["signature"], record=said["record"])
        _check_loaded(found, path)
        return found


def _check_loaded(found: Trajectories, path: str | Path) -> None:
    """Raise ErtaError, with the field, for what no trajectories hold."""
    signature, record = Fields(path, found.signature, "signature"), Fields(path, found.record, "record")
    steps, count = len(signature.grid("sigmas")) - 1, len(record.texts("prompts", 1))
    record.texts("skipped")
    record.number("seconds", 0)
    positions = len(found.positions)
    check_array(path, "latents", found.latents, (count, steps + 1, positions))
    check_array(path, "outputs", found.outputs, (count, steps, positions))
    check_array(path, "positions", found.positions, (None,), least=0)
    check_array(path, "channels", found.channels, (positions,), least=0)


ARRAYS = ("latents", "outputs", "positions", "channels", "decoded")


def record(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int = 1,
    decode: bool = True,
    positions: int = POSITIONS,
    on_prompt: Callable[[int, Trajectories], None] | None = None,
    **pipeline_kwargs: Any,
) -> Trajectories:
    """Run `pipe` uncached over `prompts` and keep what its scheduler sees.

    Args:
        pipe: a diffusers pipeline whose scheduler integrates over sigmas.
        prompts: at least one; four do nearly as well as sixteen, one loses 5 dB.
        seed: prompt k starts from the noise of a CPU generator seeded with seed + k, or with the k-th of several seeds.
        batch_size: prompts in one call.
        decode: also keep a sample of what the pipeline decodes, so that PSNR can be predicted.
        positions: how many entries of the latent are kept. Coefficients are six numbers a step, so a sample suffices.
        on_prompt: called after every call with the number of prompts done, and the trajectories so far.
        pipeline_kwargs: go to the pipeline: num_inference_steps, guidance_scale, height, width, ...

    A prompt with an output that is not finite is left out, with a warning.

    Raises ErtaError for no prompts, none left, a scheduler without sigmas, or a run that begins in the middle of its grid.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise ErtaError("trajectories need at least one prompt")
    check_bare(pipe)
    if not hasattr(pipe.scheduler, "sigmas"):
        raise ErtaError(
            f"{type(pipe.scheduler).__name__} does not integrate over sigmas: no solver can be fitted to it"
        )
    seeds = list(range(seed, seed + len(prompts))) if isinstance(seed, int) else list(seed)
    done: Trajectories | None = None
    for start in range(0, len(prompts), batch_size):
        few = list(prompts[start : start + batch_size])
        one = _record_call(pipe, few, seeds[start : start + batch_size], decode, positions, pipeline_kwargs)
        done = one if done is None else done.merge(one)
        if on_prompt is not None:
            on_prompt(start + len(few), done)
    assert done is not None
    if not done.num_prompts:
        raise NonFiniteError("the transformer's output is not finite on any of the prompts: none is left")
    return done


def batch_call(prompts: list[str], seeds: list[int], decode: bool, pipeline_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call for several prompts, each from the noise of its own CPU generator."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    call = {"output_type": "np" if decode else "latent", **pipeline_kwargs}
    single = len(prompts) == 1
    return {**call, "prompt": prompts[0] if single else prompts, "generator": generators[0] if single else generators}


def decoded_values(made: Any, decode: bool) -> np.ndarray:
    """A sample (P, Q) of what a pipeline decoded; Q = 0 if it did not."""
    samples = made.frames if hasattr(made, "frames") else made.images
    if not decode:
        return np.zeros((len(samples), 0), np.float32)
    flat = np.asarray(samples, np.float32).reshape(len(samples), -1)
    return flat[:, sampled_positions(flat.shape[1], SHOWN)]


def sampled_positions(size: int, count: int) -> np.ndarray:
    """`count` entries of `size`, ascending, the same at every call; all if there are no more."""
    if size <= count:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, count, replace=False))


@contextmanager
def steps_shown(pipe: Any, look: ShowResult) -> Iterator[Any]:
    """Calls of `pipe` inside the `with` run with a copy of its scheduler that shows every step to `look`.

    `look(output, latent, next latent)`. Yields the copy. Nobody else's calls are changed, and the transformer is not touched.
    """
    session = Session(pipe, copy.deepcopy(pipe.scheduler), UncheckedTrace())
    session.show_result = look
    session.put_on(pipe)
    with leaving(lambda: session.take_off(pipe)):
        yield session.scheduler


def _check_whole(run: int, steps: int) -> None:
    if run != steps:
        raise ErtaError(f"this call runs {run} of {steps} steps (strength below 1?): a solver is fitted to whole runs")


def _record_call(
    pipe: Any, prompts: list[str], seeds: list[int], decode: bool, positions: int, pipeline_kwargs: dict[str, Any]
) -> Trajectories:
    latents: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    shapes: list[tuple[int, ...]] = []
    chosen: torch.Tensor | None = None

    def look(output: torch.Tensor, latent: torch.Tensor, after: torch.Tensor) -> None:
        nonlocal chosen
        if chosen is None:
            check_one_forward_a_step(scheduler, nominal_sigmas(scheduler))
            steps = len(scheduler.timesteps)
            _check_whole(min(getattr(pipe, "_num_timesteps", steps), steps - first_index(scheduler)), steps)
            shapes.append(tuple(latent.shape))
            chosen = torch.from_numpy(sampled_positions(math.prod(latent.shape[1:]), positions)).to(latent.device)
            latents.append(latent.flatten(1)[:, chosen].float().cpu())
        outputs.append(output.flatten(1)[:, chosen].float().cpu())
        latents.append(after.flatten(1)[:, chosen].float().cpu())

    kwargs = batch_call(prompts, seeds, decode, pipeline_kwargs)
    arguments = call_arguments(type(pipe), pipe, (), kwargs)
    started = time.perf_counter()
    with steps_shown(pipe, look) as scheduler:
        made = pipe(**kwargs)
        takeover = takeover_step(pipe, scheduler.timesteps)
    sigmas = nominal_sigmas(scheduler)
    _check_whole(len(outputs), len(sigmas) - 1)
    (shape,) = shapes
    if shape[0] != len(prompts):
        raise ErtaError(f"{len(prompts)} prompts make {shape[0]} samples: record with one sample a prompt")
    assert chosen is not None
    axis = architecture_of(find_denoiser(pipe)).channel_axis_of(torch.empty(shape, device="meta"))
    x, v = torch.stack(latents, 1).numpy(), torch.stack(outputs, 1).numpy()
    finite = np.isfinite(x).all(axis=(1, 2)) & np.isfinite(v).all(axis=(1, 2))
    for prompt in (prompt for prompt, fine in zip(prompts, finite, strict=True) if not fine):
        warnings.warn(f"prompt {prompt!r}: an output is not finite; it is left out of the trajectories", stacklevel=3)
    kept = [place for place, fine in enumerate(finite) if fine]
    scale, second = guidance_scale_of(arguments), second_scale_of(arguments)
    return Trajectories(
        latents=x[kept],
        outputs=v[kept],
        positions=chosen.cpu().numpy(),
        channels=np.unravel_index(chosen.cpu().numpy(), shape[1:])[axis - 1 if axis > 0 else axis],
        decoded=decoded_values(made, decode)[kept],
        signature={
            **model_signature(pipe),
            **argument_signature(arguments),
            "sigmas": [float(sigma) for sigma in sigmas],
            "guidance_scale": None if scale is None else float(scale),
            "guidance_scale_2": None if second is None or takeover is None else float(second),
            "takeover": takeover,
            "latent_shape": list(shape[1:]),
        },
        record={
            "prompts": [prompts[place] for place in kept],
            "seeds": [seeds[place] for place in kept],
            "skipped": [prompt for prompt, fine in zip(prompts, finite, strict=True) if not fine],
            "channel_axis": axis - len(shape) if axis > 0 else axis,
            "seconds": time.perf_counter() - started,
            "device": str(pipe._execution_device),
            "dtype": str(find_denoiser(pipe).dtype),
            "call": {
                key: value for key, value in pipeline_kwargs.items() if isinstance(value, (int, float, str, type(None)))
            },
        },
    )
