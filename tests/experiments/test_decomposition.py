"""TODO DOC"""

from __future__ import annotations

import json

import pytest

from tests.commands import folders


def test_decomposition_command(command, tmp_path):
    code, printed = command("experiment=decomposition", "bench.num_prompts=2", "cache=policy")
    assert code == 0 and "injected" in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3) and record["shares"]["grid"] == 0
    assert len(record["propagation_gain"]) == 6 and (folder / "figures" / "decomposition.png").stat().st_size > 5000
    code, printed = command("experiment=decomposition", "cache=none")
    assert code == 1 and "no error to split" in printed
