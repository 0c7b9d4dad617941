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


def parts(calibrations, tmp_path):
    """Metadata and arrays of a calibration's file."""
    calibrations["unipc"].save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "np") as file:
        return dict(file.metadata()), {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118


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
