"""A solver as a diffusers scheduler: the pipeline makes K iterations, and nothing touches the transformer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from erta.errors import ErtaError, SignatureMismatch
from erta.scheduler import nominal_sigmas
from erta.signature import check_signature, model_signature
from erta.solver import Solver
from erta.solver_files import BASE, CONFIG_FILE, MODEL, MadeFor, read_folder, write_tables

SAME_GRID = 1e-4


class FittedScheduler(SchedulerMixin, ConfigMixin):
    """A linear multistep solver with planned nodes and coefficients, in the place of the pipeline's own scheduler.

        pipe.scheduler = erta.FittedScheduler.from_pretrained(folder)
        frames = pipe(prompt, num_inference_steps=17).frames

    It is made by `erta.fit` or `erta.collapse`. The transformer is run at its K nodes and nowhere else, and holds nothing of it:
    pipelines may share the transformer, compile it, offload it. The latents and outputs of a few nodes are kept (`solver.kept`).
    One that was fitted with `branches="apart"` is the exception: it runs inside `erta.branches_apart(pipe)`, where a hook looks at
    the transformer's outputs, so that the transformer may not be compiled whole (its blocks may).

    Its `config` is that of the scheduler it stands for, so `UniPCMultistepScheduler.from_config(pipe.scheduler.config)` gives
    that one back.

    Args:
        solver: nodes and coefficients.
        base: the scheduler that it stands for; its configuration is taken over.
        made_for: size of the latents, and where their channels are.

    Raises ErtaError for a scheduler that predicts something else than a flow's velocity.
    """

    config_name = CONFIG_FILE
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, solver: Solver, base: Any, made_for: MadeFor | None = None) -> None:
        config = {name: value for name, value in dict(base.config).items() if not name.startswith("_")}
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ErtaError(
                f"prediction_type is {config['prediction_type']!r}: a solver is made of velocities (flow_prediction)"
            )
        self.register_to_config(**config, **{BASE: dict(base.config).get(BASE, type(base).__name__)})
        self.solver, self.made_for = solver, made_for or MadeFor()
        self.sigmas = torch.from_numpy(np.array(solver.sigmas, np.float32))
        self.timesteps = torch.from_numpy(np.array(solver.timesteps))
        self.num_inference_steps = solver.num_steps
        self._step_index: int | None = None
        self._begin_index: int | None = None
        # by table, what the last nodes had, newest first; None: no later rule needs it
        self._history: list[list[torch.Tensor | None]] = []
        self.contrast_of: Callable[[], torch.Tensor] | None = None  # see `erta.branches`
        self._needed = [_needed(table) for table in solver.tables.values()]
        self._forget()

    @property
    def report(self) -> dict[str, Any]:
        """How the solver came about."""
        return self.solver.report

    @property
    def step_index(self) -> int | None:
        """The step that is carried out next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step with which the pipeline says that it begins."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by pipelines before the first step.

        Raises ErtaError for a run that begins where the rules need nodes before the first.
        """
        for step in range(begin_index, self.solver.num_steps):
            if self.solver.reach(step) > step - begin_index:
                raise ErtaError(
                    f"this run begins at step {begin_index} of {self.solver.num_steps} (strength below 1?), but the solver's "
                    f"rule at step {step} needs {self.solver.reach(step)} steps before it: use the pipeline's own scheduler"
                )
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """The solver's nodes; called by the pipeline.

        The evenly spread sigmas that some pipelines pass by themselves (FLUX) are replaced by the nodes.

        Raises ErtaError for another number of steps and for sigmas of the user's own; SignatureMismatch for a shift (`mu`) that
        makes another grid than the one the solver is for.
        """
        steps = self.solver.num_steps
        asked = num_inference_steps if num_inference_steps is not None else len(sigmas) if sigmas is not None else None
        if asked is None:
            raise ErtaError(f"give the number of steps: num_inference_steps={steps}")
        if asked != steps:
            raise ErtaError(
                f"this solver has {steps} steps: call the pipeline with num_inference_steps={steps}, not {asked}"
            )
        if sigmas is not None and not np.allclose(
            np.asarray(sigmas, float), np.linspace(1, 1 / steps, steps), atol=1e-6
        ):
            raise ErtaError("this solver brings its own sigmas: leave out sigmas=")
        if mu is not None:
            self._check_shift(mu, sigmas is not None)
        self.sigmas = torch.from_numpy(np.array(self.solver.sigmas, np.float32)).to("cpu")
        self.timesteps = torch.from_numpy(np.array(self.solver.timesteps)).to(device or "cpu")
        self.num_inference_steps = steps
        self._step_index = self._begin_index = None
        self._forget()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """`x[k+1]` from the guided output and the latent at node k, in float32; both of one shape, also what is returned.

        Raises ErtaError after the last step, and for latents of another number of channels than the coefficients are for.
        """
        if self._step_index is None:
            if self._begin_index is None:
                self.set_begin_index(self.index_of(timestep))
            self._step_index = self._begin_index or 0
        k = self._step_index
        if k >= self.solver.num_steps:
            raise ErtaError(f"this solver has {self.solver.num_steps} steps, and all of them are done")
        if k == self._begin_index:
            self._check_shape(sample)
        if self.solver.contrast is None:
            result = self._next(k, model_output, sample)
        elif self.contrast_of is None:
            raise ErtaError(
                "this solver tells the guidance branches apart: call the pipeline inside `with erta.branches_apart(pipe):`"
            )
        else:
            result = self._next(k, model_output, sample, _shaped_like(model_output, self.contrast_of()))
        result = result.to(model_output.dtype)
        self._step_index = k + 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _next(self, k: int, *present: torch.Tensor) -> torch.Tensor:
        """`x[k+1]`, in float32, from guided output and latent, and the contrast if the solver has coefficients for it."""
        latent = present[1]
        self._history = [[new, *values] for new, values in zip(present, self._history, strict=True)]
        result = self._advance(k, latent)
        # what no later rule needs is let go now: the next forward is where memory is short
        self._history = [
            [value if needed[k + 1, lag] else None for lag, value in enumerate(values, 1)][: self.solver.memory - 1]
            for needed, values in zip(self._needed, self._history, strict=True)
        ]
        return result

    def _advance(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """One step's rule, in float32."""
        solver, x = self.solver, x.float()
        result = x + self._spread(solver.offset[step], x)
        for table, values in zip(solver.tables.values(), self._history, strict=True):
            for coefficients, value in zip(table[step], values, strict=False):
                if value is not None and coefficients.any():
                    factor = self._spread(coefficients, x)
                    result = (
                        torch.addcmul(result, factor, value.float())
                        if torch.is_tensor(factor)
                        else result.add(value, alpha=factor)
                    )
        return result

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The latents as they are; for pipelines that ask."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A clean sample with the noise of a node: `sigma noise + (1 - sigma) sample`; for image-to-image."""
        sigma = float(self.sigmas[self.index_of(torch.as_tensor(timestep).flatten()[0])])
        return sigma * noise + (1 - sigma) * sample

    def index_of(self, timestep: float | torch.Tensor) -> int:
        """The node that a timestep belongs to. Raises ErtaError for another's."""
        gaps = (self.timesteps.cpu().double() - float(timestep)).abs()
        if float(gaps.min()) > 1e-3:
            raise ErtaError(f"timestep {float(timestep):g} is not one of this solver's nodes")
        return int(gaps.argmin())

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def base(self) -> Any:
        """The scheduler that this one stands for, made of its configuration."""
        return getattr(diffusers, self.config[BASE]).from_config(self.config)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json` and `solver.safetensors` into a folder."""
        if push_to_hub:
            raise ErtaError("a solver is written to a folder: upload it with huggingface_hub")
        folder = Path(save_directory)
        self.save_config(folder, push_to_hub=False)
        write_tables(folder, self.solver, self.made_for)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        pipe: Any = None,
        **kwargs: Any,
    ) -> FittedScheduler:
        """Read a folder that `save_pretrained` wrote.

        Args:
            pipe: the pipeline that it is for, to be checked against; None: not checked.

        Raises ErtaError, with file and field, if it is something else, truncated or edited; SignatureMismatch if it was made for
        another model.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        found = read_folder(folder)
        try:
            made = cls(found.solver, found.base, found.made_for)
        except ErtaError as error:
            raise ErtaError(f"{folder / cls.config_name}: {error}") from error
        if pipe is not None and made.made_for.model is not None:
            check_signature(made.made_for.model, model_of(pipe))
        return made

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Not possible: nodes and coefficients are in no configuration. Raises ErtaError."""
        raise ErtaError(
            "a FittedScheduler is not made of another's configuration: use erta.fit, or FittedScheduler.from_pretrained(folder)"
        )

    def _forget(self) -> None:
        self._history = [[] for _ in self.solver.tables]
        self._spread_out: dict[tuple[bytes, torch.device], torch.Tensor] = {}

    def _spread(self, coefficients: np.ndarray, x: torch.Tensor) -> float | torch.Tensor:
        """One number, or a tensor that spreads along the channels of `x`; laid out once a call."""
        if len(coefficients) == 1:
            return float(coefficients[0])
        key = coefficients.tobytes(), x.device
        if key not in self._spread_out:
            shape = [1] * x.ndim
            shape[self.made_for.channel_axis] = -1
            self._spread_out[key] = torch.from_numpy(coefficients.copy()).to(x.device, torch.float32).reshape(shape)
        return self._spread_out[key]

    def _check_shape(self, sample: torch.Tensor) -> None:
        channels = self.solver.offset.shape[1]
        if channels > 1 and sample.shape[self.made_for.channel_axis] != channels:
            raise SignatureMismatch("channels", channels, sample.shape[self.made_for.channel_axis])
        if self.made_for.latent_shape not in (None, tuple(sample.shape[1:])):
            warnings.warn(
                f"this solver was made for latents of {self.made_for.latent_shape} and runs on {tuple(sample.shape[1:])}: its "
                "error there is not known",
                stacklevel=3,
            )

    def _check_shift(self, mu: float, brings_sigmas: bool) -> None:
        base, steps = self.base(), self.solver.num_nominal
        if not base.config.get("use_dynamic_shifting"):
            return
        grid = {"sigmas": np.linspace(1, 1 / steps, steps)} if brings_sigmas else {"num_inference_steps": steps}
        base.set_timesteps(**grid, mu=mu)
        found, wanted = nominal_sigmas(base), self.solver.nominal_sigmas
        if not np.allclose(found, wanted, atol=SAME_GRID):
            raise SignatureMismatch("sigmas (shifted by the image's size)", _middle(wanted), _middle(found))


def model_of(pipe: Any) -> dict[str, Any]:
    """What tells a pipeline's transformer from others, for `MadeFor`."""
    found = model_signature(pipe)
    return {name: found[name] for name in MODEL}


def _shaped_like(output: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """The contrast as the pipeline hands outputs on: some take an axis away. Raises ErtaError where it hands on a part."""
    if contrast.numel() == output.numel():
        return contrast.reshape(output.shape)
    raise ErtaError(
        f"the transformer answers with {tuple(contrast.shape)} and the scheduler is given {tuple(output.shape)}: of this pipeline "
        "the branches cannot be told apart, fit with branches='together'"
    )


def _needed(table: np.ndarray) -> np.ndarray:
    """(K + 1, H + 1): whether the rule of step k, or a later one, needs what lies `lag` nodes before k."""
    steps, memory = table.shape[:2]
    needed = np.zeros((steps + 1, memory + 1), bool)
    for k in reversed(range(steps)):
        needed[k, :memory] = table[k].any(axis=1) | needed[k + 1, 1:]
    return needed


def _middle(grid: np.ndarray) -> str:
    return f"{len(grid) - 1} steps, {grid[len(grid) // 2]:.4f} in the middle"
