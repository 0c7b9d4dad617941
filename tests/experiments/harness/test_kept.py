"""What is kept of searches: for the same inputs, and also as earlier versions kept it."""

from __future__ import annotations

import pytest

from experiments.harness import kept
from experiments.harness.setup import Setup
from experiments.methods.common import knob
from tests.commands import config
from tests.pipelines import CALL, build_pipe


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Setup(config(*[f"model.{key}={value}" for key, value in CALL.items()]), build_pipe())


def test_what_was_counted_otherwise_is_measured_anew(setup, monkeypatch):
    """A kept measurement serves the next run, unless the counting has changed since. Mutant: kept for ever."""
    made = []

    def measure():
        made.append({"value": len(made)})
        return made[-1]

    found = [kept.kept(setup, "m", [1], measure) for _ in range(2)]
    monkeypatch.setattr(kept, "COUNTED", kept.COUNTED + 1)
    found.append(kept.kept(setup, "m", [1], measure))
    assert [one["value"] for one in found] == [0, 0, 1]


def test_what_an_earlier_version_kept_is_read(setup):
    """Knobs were kept under the place of their method. Mutants: searched anew; another method's taken."""
    kept.kept(setup, "m", ["experiments.peers.fora.arm", 1], lambda: {"value": "fora"})
    kept.kept(setup, "m", ["experiments.peers.shipped.pab", 1], lambda: {"value": "pab"})
    for target, value in {"fora": "fora", "pab": "pab", "pab_diffusers": "pab", "t_gate": "anew"}.items():
        before = [[place, 1] for place in knob._places_before(f"experiments.methods.{target}.arm")]
        assert kept.kept(setup, "m", [target, 1], lambda: {"value": "anew"}, before)["value"] == value
