"""experiment=solver_limits: what is changed between fit and run, and only that."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import solver_limits

SMALL = (
    "experiment=solver_limits", "model=flux_tiny", "model.num_inference_steps=6", "cache.steps=3", "bench.num_prompts=2",
    "calibration.num_prompts=2", "solver_limits.guidances=[5]", "solver_limits.prompts=[1]", "solver_limits.positions=[64]",
    "solver_limits.refine=2",
)  # fmt: skip


@pytest.mark.parametrize(("steps", "count"), [(50, 17), (30, 15), (8, 7), (6, 1), (5, 5)])
def test_unplanned_nodes_ascend_from_zero(steps, count):
    """Mutants: two nodes at one step; a node behind the last step; early and late exchanged."""
    spread = solver_limits.spread_nodes(steps, count)
    for nodes in spread.values():
        assert nodes[0] == 0 and len(set(nodes)) == count and list(nodes) == sorted(nodes) and nodes[-1] < steps
    early, even, late = (np.mean(spread[name]) for name in ("crowded early", "evenly spread", "crowded late"))
    assert early <= even <= late and (count < 5 or steps - count < 3 or early < even < late)


def test_weights_are_changed_by_as_much_as_asked_and_put_back():
    """Mutants: the change relative to nothing; weights left changed after an error."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 8))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="user"), solver_limits.changed_weights(model, 0.1):
        change = model[0].weight - before[0]
        assert (change.norm() / before[0].norm()).item() == pytest.approx(0.1, rel=1e-4)
        assert torch.linalg.matrix_rank(change) == solver_limits.RANK
        assert torch.equal(model[1].weight, before[2]) and torch.equal(model[0].bias, before[1])
        raise RuntimeError("user")
    assert all(torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_through_the_command_line(command, tmp_path):
    """Mutants: the matched solver of another place; short prompts counted; a condition run on the unchanged pipeline."""
    code, printed = command(*SMALL, quick=False)
    assert code == 0, printed
    (path,) = tmp_path.rglob("record.json")
    record = json.loads(path.read_text())
    conditions = record["series"]["conditions"]
    assert len(conditions["as calibrated"]["psnr_db"]) == 2
    assert conditions["as calibrated"]["psnr_db"] == conditions["as calibrated"]["matched"]
    assert len(conditions["fitted to short prompts, run on long ones"]["psnr_db"]) == 1
    for title, one in conditions.items():
        at_home = title.startswith(("as calibrated", "run "))
        assert at_home or one["matched"][0] in conditions["as calibrated"]["psnr_db"]
    elsewhere = [conditions[title]["psnr_db"] for title in conditions if title.startswith("run ")]
    assert len(elsewhere) == 2 and all(values != conditions["as calibrated"]["psnr_db"] for values in elsewhere)
    assert {"nodes refined by 2 moves", "nodes by errors as they grow", "fitted with two terms"} <= set(conditions)
    assert len(record["claims"]) == len(conditions) - 1 and (path.parent / "figures" / "solver_limits.png").is_file()
    assert (path.parent / "figures" / "worst.png").is_file()  # the two samples of each prompt, the worst first
    assert len(list((path.parent / "worst" / "as_calibrated").glob("*.webp"))) == 2 * 2
    assert "predicted by cross-validation" in printed and "another size" in printed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("solver_limits.prompts=[0]", "solver_limits.prompts must be a list of which each entry is at least 1"),
        ("solver_limits.weights=0", "solver_limits.weights must be > 0"),
        ("bench.num_prompts=1", "bench.num_prompts=2 or more"),
    ],
)
def test_values_that_mean_nothing_are_named(command, wrong, said):
    code, printed = command(*SMALL, wrong, quick=False)
    assert code == 1 and said in printed.replace("\n", " ") and "Traceback" not in printed
