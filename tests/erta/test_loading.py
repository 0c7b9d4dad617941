"""Files that were changed are refused with the field, before anything is computed from them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import erta
from erta.errors import ErtaError
from erta.plan import Rectification
from erta.scheduler import nominal_sigmas


def changed(data, place: str, value):
    """The JSON with another value at a dotted place."""
    *outer, last = place.split(".")
    inside = data
    for key in outer:
        inside = inside[int(key)] if isinstance(inside, list) else inside[key]
    inside[int(last) if isinstance(inside, list) else last] = value
    return data


PLANS = {
    "steps.mask": ["0", "1"] * 4,
    "steps.mask.2": 2,
    "sigmas.0": 5.0,
    "sigmas.3": float("nan"),
    "sigmas": "abc",
    "nominal_sigmas": [1.0, 0.5],
    "site": "middle",
    "reuse": 3,
    "corrector_at_reused": "true",
    "rectification.form": "foo",
    "rectification.gain.1.0.0": float("nan"),
    "rectification.offset.1.0": [0.0],
    "rectification.gain": 1.0,
    "branches": "cond",
    "latent_shape": [0, -1],
    "guidance_scale": float("inf"),
    "takeover": 99,
    "signature": {},
    "report": [],
}


@pytest.mark.parametrize("place", PLANS)
def test_a_plan_with_another_value(calibrations, tmp_path, place):
    """Mutants: NaN gains, a first sigma of 5, texts as a mask, an unknown form taken as they are."""
    plan = calibrations["unipc"].plan(steps=4)
    plan.save(tmp_path / "plan.json")
    assert erta.Plan.load(tmp_path / "plan.json").mask == plan.mask
    data = changed(json.loads((tmp_path / "plan.json").read_text()), place, PLANS[place])
    (tmp_path / "plan.json").write_text(json.dumps(data))
    field = place.split(".")[0]
    with pytest.raises(ErtaError, match=rf"plan\.json: {field if field != 'nominal_sigmas' else '(nominal_)?sigmas'}"):
        erta.Plan.load(tmp_path / "plan.json")


CALIBRATIONS = {
    "signature": ({}, "signature is empty"),
    "record": ({}, "record is empty"),
    "signature.sigmas": ([5.0, float("nan")], "signature.sigmas holds NaN"),
    "signature.branches": ("cond", "signature.branches must be a list"),
    "signature.site": ("foo", "signature.site must be one of output, blocks"),
    "record.prompts": ([], "record.prompts must be"),
    "record.window": ("6", "record.window must be a whole number"),
    "record.seconds": (-1, "record.seconds must be"),
}


@pytest.mark.parametrize("place", CALIBRATIONS)
def test_a_calibration_with_another_field(calibrations, tmp_path, place):
    value, said = CALIBRATIONS[place]
    metadata, arrays = parts(calibrations, tmp_path)
    name, _, rest = place.partition(".")
    metadata[name] = json.dumps(changed(json.loads(metadata[name]), rest, value) if rest else value)
    save_file(arrays, tmp_path / "c.safetensors", metadata)
    with pytest.raises(ErtaError, match=rf"c\.safetensors: {said}"):
        erta.Calibration.load(tmp_path / "c.safetensors")


ARRAYS = {
    "rel_l1.mean": (lambda a: a * np.nan, "rel_l1.mean holds NaN"),
    "phi_ratio.m2": (lambda a: a - 1, "phi_ratio.m2 must be ≥ 0"),
    "moments.s_vv": (lambda a: a[:, :-1], r"moments.s_vv must be numbers of shape \(2, 8, 6, 16\)"),
    "moments.count": (lambda a: a.astype(bool), "moments.count must be numbers"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_calibration_with_other_numbers(calibrations, tmp_path, name):
    make, said = ARRAYS[name]
    metadata, arrays = parts(calibrations, tmp_path)
    arrays[name] = np.ascontiguousarray(make(arrays[name]))
    save_file(arrays, tmp_path / "c.safetensors", metadata)
    with pytest.raises(ErtaError, match=rf"c\.safetensors: {said}"):
        erta.Calibration.load(tmp_path / "c.safetensors")


@pytest.fixture
def solver_folder(pipe, tmp_path):
    """A solver of 4 nodes with a coefficient a channel, saved."""
    pipe.scheduler.set_timesteps(8)
    sigmas = nominal_sigmas(pipe.scheduler)
    gain = np.random.default_rng(0).normal(1, 0.1, (8, 1, 16))
    plan = erta.Plan(
        (True, True, False, True, False, False, True, False),
        sigmas,
        sigmas,
        branches=("cond",),
        latent_shape=(16, 2, 4, 4),
        rectification=Rectification(gain, gain - 1),
    )
    erta.collapse(pipe, plan).save_pretrained(tmp_path / "solver")
    return tmp_path / "solver"


def parts(calibrations, tmp_path):
    """Metadata and arrays of a calibration's file."""
    calibrations["unipc"].save(tmp_path / "c.safetensors")
    return parts_of(tmp_path / "c.safetensors")


def parts_of(path):
    """Metadata and arrays of a file."""
    with safe_open(path, "np") as file:
        return dict(file.metadata()), {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118


SOLVER_CONFIGS = {
    "_base_class_name": ("WanPipeline", "_base_class_name must be the name of a scheduler of diffusers"),
    "_class_name": ("UniPCMultistepScheduler", "_class_name must be one of FittedScheduler"),
    "num_train_timesteps": (0, "num_train_timesteps must be a whole number from 1"),
    "solver_order": ("2", "solver_order must be a whole number from 0"),
    "flow_shift": (float("nan"), "flow_shift must be a finite number"),
    "sigma_max": (float("inf"), "sigma_max must be without NaN and infinity"),
    "use_flow_sigmas": ("true", "use_flow_sigmas must be true or false"),
    "disable_corrector": (3, "disable_corrector must be a list"),
    "solver_type": ("foo", "diffusers makes no UniPCMultistepScheduler of it"),
    "prediction_type": ("epsilon", "prediction_type is 'epsilon'"),
}


@pytest.mark.parametrize("key", SOLVER_CONFIGS)
def test_a_solver_of_another_configuration(solver_folder, key):
    """Mutants: any class of diffusers taken for a scheduler; a NaN shift, which makes another grid."""
    value, said = SOLVER_CONFIGS[key]
    path = solver_folder / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ErtaError, match=rf"scheduler_config\.json: {said}"):
        erta.FittedScheduler.from_pretrained(solver_folder)


SOLVER_FIELDS = {
    "nodes": (["0", 2, 3, 5], "made_for.nodes must be a list of whole numbers"),
    "nodes.3": (99, "there is no node 99"),
    "nodes.1": (0, "the nodes of a solver ascend"),
    "latent_shape": ([16, 0], "made_for.latent_shape must be"),
    "channel_axis": (0, "made_for.channel_axis must be a whole number from -4 to -1"),
    "channel_axis.": (-1, "made_for.channel_axis must be the axis of the 16 channels"),
    "takeover": (9, "made_for.takeover must be a whole number from 0 to 4"),
    "model": ({"weights": "x"}, "made_for.model.model_class must be there"),
    "shape": ([16], "made_for.shape must be left out"),
}


@pytest.mark.parametrize("place", SOLVER_FIELDS)
def test_a_solver_with_another_field(solver_folder, place):
    """Mutants: nodes as texts; an axis that is not the channels', whose gains are laid along the width."""
    value, said = SOLVER_FIELDS[place]
    metadata, tables = parts_of(solver_folder / "solver.safetensors")
    made_for = {**json.loads(metadata["made_for"]), "latent_shape": [16, 2, 4, 4], "channel_axis": -4}
    metadata["made_for"] = json.dumps(changed(made_for, place.rstrip("."), value))
    save_file(tables, solver_folder / "solver.safetensors", metadata)
    with pytest.raises(ErtaError, match=rf"solver\.safetensors: {said}"):
        erta.FittedScheduler.from_pretrained(solver_folder)


def _with(place, value):
    def change(table):
        table[place] = value
        return table

    return change


SOLVER_TABLES = {
    "sigmas": (lambda a: a[::-1], "sigmas must be strictly decreasing"),
    "timesteps": (_with(1, -1), "timesteps must be ≥ 0"),
    "timesteps ": (lambda a: a[::-1], "timesteps must not ascend"),
    "timesteps  ": (_with(0, 5000), "timesteps reach 5000"),
    "nominal_sigmas": (lambda a: a[:1], "nominal_sigmas must be strictly decreasing"),
    "velocity": (_with((1, 0, 3), np.nan), "velocity holds NaN"),
    "velocity ": (lambda a: a[0], r"velocity must be numbers of shape \(4, any, any\)"),
    "velocity  ": (lambda a: a[:, :0], "velocity must hold numbers|latent must be numbers"),
    "contrast": (lambda a: a[:, :1], r"contrast must be numbers of shape \(4, 2, 16\)"),
    "contrast ": (_with((0, 1, 0), 1.0), "contrast of a solver reaches before its first step"),
    "latent": (lambda a: a.astype(bool), "latent must be numbers"),
    "latent ": (_with((0, 1, 0), 1.0), "latent of a solver reaches before its first step"),
    "offset": (_with((0, 0), 1e300), "offset must hold numbers that float32 has"),
    "offset ": (lambda a: a[:, :5], r"offset must be numbers of shape \(4, 16\)"),
}


@pytest.mark.parametrize("name", SOLVER_TABLES)
def test_a_solver_with_other_numbers(solver_folder, name):
    """Mutant: 1e300, which is finite until the step is made in float32."""
    make, said = SOLVER_TABLES[name]
    metadata, tables = parts_of(solver_folder / "solver.safetensors")
    tables["contrast"] = tables["velocity"].copy()
    tables[name.strip()] = np.ascontiguousarray(make(tables[name.strip()]))
    save_file(tables, solver_folder / "solver.safetensors", metadata)
    with pytest.raises(ErtaError, match=rf"solver\.safetensors: ({said})"):
        erta.FittedScheduler.from_pretrained(solver_folder)


@pytest.mark.parametrize("said", ["made_for", "report"])
def test_what_a_solver_says_of_itself_is_an_object(solver_folder, said):
    metadata, tables = parts_of(solver_folder / "solver.safetensors")
    save_file(tables, solver_folder / "solver.safetensors", {**metadata, said: "[1]"})
    with pytest.raises(ErtaError, match=rf"solver\.safetensors: {said} must be an object"):
        erta.FittedScheduler.from_pretrained(solver_folder)
    save_file(tables, solver_folder / "solver.safetensors", {**metadata, said: "{"})
    with pytest.raises(ErtaError, match="cannot read a solver from"):
        erta.FittedScheduler.from_pretrained(solver_folder)


@pytest.mark.parametrize("load", [erta.Plan.load, erta.Calibration.load, erta.Trajectories.load])
def test_what_cannot_be_read_says_why(tmp_path, load):
    """Mutant: the library's own "no such file" for a folder and for links in a circle."""
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    (tmp_path / "empty").write_bytes(b"")
    for name, said in {"": "is a directory", "loop": "symbolic links", "nowhere": "no such file"}.items():
        with pytest.raises(ErtaError, match=f"cannot read .*{said}"):
            load(tmp_path / name)
    with pytest.raises(ErtaError, match="cannot read"):
        load(tmp_path / "empty")


def test_calibrate_does_not_lose_what_it_is_given(pipe):
    with pytest.raises(ErtaError, match="generator=…"):
        erta.calibrate(pipe, ["a red circle"], generator=object(), num_inference_steps=4)
