"""experiment=decomposition."""

from __future__ import annotations

import json

import pytest

from analysis import decomposition
from tests.commands import folders

GROWTH = ("decomposition.growth_prompts=3", "decomposition.growth_directions=2")


@pytest.mark.slow
def test_decomposition_command(command, tmp_path):
    code, printed = command("experiment=decomposition", "bench.num_prompts=2", "cache=policy", *GROWTH)
    assert code == 0 and "injected" in printed, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert sum(record["shares"].values()) == pytest.approx(1, abs=1e-3) and record["shares"]["grid"] == 0
    assert len(record["growth"]) == 6 and {len(values) for values in record["growth"].values()} == {3 * 2}
    assert all(value == pytest.approx(1, rel=1e-2) for value in record["growth"]["5"])
    figure = folder / "figures" / "decomposition.png"
    assert figure.stat().st_size > 5000 and "growth of an error after step 0" in printed
    figure.unlink()
    assert decomposition.main([str(folder)]) == 0 and figure.is_file()
    code, printed = command("experiment=decomposition", "cache=none")
    assert code == 1 and "no error to split" in printed
