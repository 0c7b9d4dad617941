"""TODO DOC"""

from __future__ import annotations

from experiments.harness import kept
from tests.commands import config
from tests.pipelines import CALL, build_pipe


def test_what_was_counted_otherwise_is_measured_anew(tmp_path, monkeypatch):
    """A kept measurement serves the next run, unless the counting has changed since. Mutant: kept for ever."""
    monkeypatch.chdir(tmp_path)
    cfg, pipe, made = config(*[f"model.{key}={value}" for key, value in CALL.items()]), build_pipe(), []

    def measure():
        made.append({"value": len(made)})
        return made[-1]

    found = [kept.kept(cfg, pipe, "m", [1], measure) for _ in range(2)]
    monkeypatch.setattr(kept, "COUNTED", kept.COUNTED + 1)
    found.append(kept.kept(cfg, pipe, "m", [1], measure))
    assert [one["value"] for one in found] == [0, 0, 1]
