"""Conclusions by regime, and how real a model is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from analysis.comparison import Comparison
from experiments import realism, regimes
from tests.analysis import tables as made_up
from tests.commands import config, folders

one, row = made_up.one, made_up.row


def test_conclusions_are_paired_by_prompt_in_every_cell():
    """Two regimes with opposite outcomes, a row that one of them lacks. Mutants: worse minus better, means for pairs, a cell's
    rows compared with another's."""

    def table(ours: list[float], others: list[float], warm: bool) -> Comparison:
        rows = [
            (row("ertacache"), [one(value) for value in ours]),
            (row("gcache"), [one(value) for value in others]),
            (row("policy"), [one(30.0), one(30.0)]),
            (row("uniform"), [one(20.0), one(None)]),
        ]
        if warm:
            rows.append((row("gcache, no warm-up"), [one(10.0), one(11.0)]))
        return Comparison(made_up.table(rows))

    found = regimes.conclusions(
        {1.0: table([40.0, 50.0], [45.0, 51.0], True), 9.0: table([40.0, 50.0], [30.0, 49.0], False)}
    )
    closer = found["Gcache is closer than Ertacache"]
    assert closer["guidance 1, 3 steps"].tolist() == [5, 1] and closer["guidance 9, 3 steps"].tolist() == [-10, -1]
    assert found["the policy's steps beat evenly spread ones"]["guidance 1, 3 steps"].tolist() == [10, -70]
    assert list(found["Gcache: its warm-up helps"]) == ["guidance 1, 3 steps"]
    assert "the rectification helps" not in found and len(found) == 3


def test_a_comparison_for_each_guidance():
    cfg = config("experiment=regimes", "model=flux_tiny", "regimes.guidances=[1,3.5]", "bench.num_prompts=4")
    (_, first), (guidance, second) = regimes.members_of(cfg)
    assert first.name == "guidance_1" and guidance == 3.5
    assert {"model=flux_tiny", "model.guidance_scale=3.5", "bench.num_prompts=4"} < set(second.overrides)


def test_true_guidance_as_the_dial():
    """Mutant: true guidance on top of the embedded one."""
    cfg = config("experiment=regimes", "model=flux_tiny", "regimes.guidances=[9]", "regimes.dial=true_cfg_scale")
    ((_, member),) = regimes.members_of(cfg)
    assert {"model.guidance_scale=1", "model.true_cfg_scale=9"} < set(member.overrides)
    assert member.name == "true_guidance_9"


def test_printed_order_is_of_the_model_with_the_same_pipeline():
    """Wan's rows at the same share of steps, of one table each; each printed pair is a claim, the closer one first.

    Mutants: rows of FLUX, pairs across levels, the printed order the other way round.
    """
    order = realism.printed_order(config("experiment=realism", "model=wan21_tiny"))
    slow, ablation = order["Wan2.1 1.3B, slow"], order["Table 3, ablation"]
    assert slow["GCache"] == {"method": "gcache", "printed": 32.44, "computed": 24} and "ProfilingDiT" not in slow
    assert [one["computed"] for one in ablation.values()] == [25] * 4
    for rows in order.values():
        for found in rows.values():
            found["psnr_db"] = [found["printed"], found["printed"] + 1]
    claims = realism.pairs(order)
    assert len(claims) == 3 + 6 and all(min(claim.values) > 0 for claim in claims)
    images = realism.printed_order(config("experiment=realism", "model=flux_tiny"))
    assert all(name.startswith("FLUX.1-dev") for name in images)


@pytest.mark.slow
def test_realism_through_the_command_line(command, tmp_path):
    """What it prints is what it kept: fewer steps in order, growth of an error in every place, pairs with verdicts."""
    code, printed = command(
        "experiment=realism", "bench.num_prompts=2", "calibration.num_prompts=2", "cache.options=null"
    )
    assert code == 1 and "cache" in printed  # the cache is not this experiment's to set
    code, printed = command("experiment=realism", "bench.num_prompts=2", "calibration.num_prompts=2")
    assert code == 0, printed
    (folder,) = [one for one in folders(tmp_path) if (one / "record.json").is_file()]
    series = json.loads((folder / "record.json").read_text())["series"]
    assert np.mean(series["fewer"]["1/2"]) > np.mean(series["fewer"]["1/3"])
    for kind in ("random", "along"):
        assert all(len(values) == 2 and min(values) > 0 for values in series["growth"][kind].values())
    assert series["growth"]["random"]["0"] != series["growth"]["along"]["0"]
    assert "growth" in printed and (folder / "figures" / "realism.png").is_file()
