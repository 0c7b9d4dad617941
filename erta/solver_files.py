"""A solver's folder: the configuration of the scheduler that it stands for, and one file of tables. Checked as it is read."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from erta.errors import ErtaError
from erta.files import save_arrays
from erta.loading import Fields, arrays_of, check_array, check_readable, check_sigmas
from erta.solver import Solver

SCHEMA = "erta.solver/1"
SCHEMA_APART = "erta.solver/2"  # with a table that earlier versions would leave out
CONFIG_FILE, SOLVER_FILE = "scheduler_config.json", "solver.safetensors"
BASE = "_base_class_name"  # diffusers drops names with a leading underscore where another class is made of the config
APART = "contrast"  # a table that only solvers have which tell the guidance branches apart
TABLES = ("sigmas", "timesteps", "nominal_sigmas", "velocity", "latent", "offset")
MODEL = ("model_class", "model_config", "weights")
MOST_AXES = 8


@dataclass(frozen=True)
class MadeFor:
    """What a solver was made for, as far as a scheduler can see it.

    Attributes:
        latent_shape: of the latents that the pipeline integrates, without the batch axis.
        channel_axis: where their channels are, counted from the end.
        takeover: the node from which a second transformer runs; None: there is one transformer.
        model: class, configuration and weights of the transformer, as `erta.signature` has them. A scheduler does not see the
            transformer: it is checked where the pipeline is given, `FittedScheduler.from_pretrained(folder, pipe=pipe)`.
    """

    latent_shape: tuple[int, ...] | None = None
    channel_axis: int = -1
    takeover: int | None = None
    model: dict[str, Any] | None = None


@dataclass(frozen=True)
class SolverFolder:
    """What a folder holds: the solver, the scheduler that it stands for, and what it was made for."""

    solver: Solver
    base: Any
    made_for: MadeFor


def write_tables(folder: Path, solver: Solver, made_for: MadeFor) -> None:
    """Write the tables of a solver, with its nodes and its report as metadata."""
    written = {**vars(made_for), "nodes": list(solver.nodes)}
    save_arrays(
        folder / SOLVER_FILE,
        {name: getattr(solver, name) for name in TABLES} | solver.tables,
        SCHEMA if solver.contrast is None else SCHEMA_APART,
        made_for=written,
        report=solver.report,
    )


def read_folder(folder: Path) -> SolverFolder:
    """Read and check a folder. Raises ErtaError, with file and field, for whatever no solver holds."""
    config, tables = folder / CONFIG_FILE, folder / SOLVER_FILE
    for path in (config, tables):
        check_readable(path, "a solver")
    base = _read_base(config)
    solver, made_for = _read_solver(tables)
    steps = base.config.num_train_timesteps
    if float(np.max(solver.timesteps)) > steps:
        raise ErtaError(f"{tables}: timesteps reach {np.max(solver.timesteps):g}, and the scheduler has {steps}")
    return SolverFolder(solver, base, made_for)


def _read_base(path: Path) -> Any:
    """The scheduler that a solver stands for, of its configuration."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ErtaError(f"cannot read a solver from {path}: it is not JSON ({error})") from error
    fields = Fields(path, data)
    fields.text("_class_name", ["FittedScheduler"])
    name = fields.text(BASE)
    kind: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise fields.wrong(BASE, "the name of a scheduler of diffusers", name)
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.name in data and parameter.default is not inspect.Parameter.empty:
            _check_setting(fields, parameter.name, data[parameter.name], parameter.default)
    fields.whole("num_train_timesteps", 1)
    try:
        base = kind.from_config({key: value for key, value in data.items() if key != "_class_name"})
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, ImportError) as error:
        raise ErtaError(f"{path}: diffusers makes no {name} of it ({error})") from error
    if not hasattr(base, "sigmas"):
        raise fields.wrong(BASE, "a scheduler that integrates over sigmas", name)
    return base


def _check_setting(fields: Fields, key: str, value: Any, usual: Any) -> None:
    """Raise ErtaError unless a setting is of the kind that its default is of, or finite where that says nothing."""
    if isinstance(usual, bool):
        fields.flag(key)
    elif isinstance(usual, int):
        fields.whole(key, 0)
    elif isinstance(usual, float):
        fields.number(key)
    elif isinstance(usual, str):
        fields.text(key)
    elif isinstance(usual, (list, tuple)) and not isinstance(value, list):
        raise fields.wrong(key, "a list", value)
    elif not _is_finite(value):
        raise fields.wrong(key, "without NaN and infinity", value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite(one) for one in value.values())
    if isinstance(value, list):
        return all(_is_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def _read_solver(path: Path) -> tuple[Solver, MadeFor]:
    with arrays_of(path, "a solver", (SCHEMA, SCHEMA_APART), "Make it again with erta.fit.") as (arrays, said):
        tables = {name: arrays[name] for name in (*TABLES, *({APART} & set(arrays)))}
        fields, report = Fields(path, said["made_for"], "made_for"), said["report"]
    nodes = fields.wholes("nodes", 0) or []
    _check_tables(path, tables, len(nodes))
    made_for = _made_for(fields, len(nodes), tables["offset"].shape[1])
    if not isinstance(report, dict):
        raise ErtaError(f"{path}: report must be an object of fields, not {type(report).__name__}")
    try:
        return Solver(nodes=tuple(nodes), report=report, **tables), made_for
    except ErtaError as error:
        raise ErtaError(f"{path}: {error}") from error


def _check_tables(path: Path, tables: dict[str, np.ndarray], steps: int) -> None:
    """Shapes and numbers of a solver of so many steps; what they mean together is checked by `Solver`."""
    check_sigmas(path, "sigmas", check_array(path, "sigmas", tables["sigmas"], (steps + 1,)))
    check_sigmas(path, "nominal_sigmas", check_array(path, "nominal_sigmas", tables["nominal_sigmas"], (None,)))
    timesteps = check_array(path, "timesteps", tables["timesteps"], (steps,), least=0)
    if (np.diff(timesteps.astype(np.float64)) > 0).any():
        raise ErtaError(f"{path}: timesteps must not ascend")
    memory, channels = check_array(path, "velocity", tables["velocity"], (steps, None, None)).shape[1:]
    check_array(path, "offset", tables["offset"], (steps, channels))
    apart = [APART] if APART in tables else []
    for name in ("latent", *apart):
        check_array(path, name, tables[name], (steps, memory, channels))
    for name in ("velocity", "latent", "offset", *apart):
        if not tables[name].size or np.abs(tables[name]).max() > np.finfo(np.float32).max:
            raise ErtaError(f"{path}: {name} must hold numbers that float32 has, for at least one node and channel")


def _made_for(fields: Fields, steps: int, channels: int) -> MadeFor:
    known = {"nodes", *(one.name for one in fields_of(MadeFor))}
    for key in fields.plain():
        if key not in known:
            raise fields.wrong(key, f"left out: the fields are {', '.join(sorted(known))}")
    shape = fields.wholes("latent_shape", optional=True)
    axis = fields.whole("channel_axis", -(MOST_AXES if shape is None else len(shape)), -1)
    assert axis is not None
    if shape is not None and channels not in (1, shape[axis]):
        raise fields.wrong("channel_axis", f"the axis of the {channels} channels of the coefficients", axis)
    if fields.plain().get("model") is not None:
        for key in MODEL:
            fields.inside("model").text(key)
    return MadeFor(
        latent_shape=None if shape is None else tuple(shape),
        channel_axis=axis,
        takeover=fields.whole("takeover", 0, steps, optional=True),
        model=fields.plain().get("model"),
    )
