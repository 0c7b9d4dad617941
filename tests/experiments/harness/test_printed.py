"""Rows of a printed table, on the paper's model and scaled down."""

from __future__ import annotations

from analysis import paper
from experiments.harness.printed import claims_of, rows_of

TABLE = paper.table("table1_video")


def test_the_papers_own_model_runs_at_the_printed_setting():
    """Thresholds where they are printed, else the share of steps. Mutant: the speed-up for the number of steps."""
    rows = {row.key: row for row in rows_of(TABLE, "wan21", 50)}
    assert rows["ERTACache (Wan2.1 1.3B, slow)"].overrides == ("cache=ertacache", "cache.threshold=0.08")
    assert rows["GCache (Wan2.1 1.3B, slow)"].overrides == ("cache=gcache", "cache.steps=24")
    assert rows["TeaCache (Wan2.1 1.3B, slow)"].computed == 25
    assert rows["ProfilingDiT (Wan2.1 1.3B, slow)"].why_not == "not run here: its method is not part of this project"
    assert dict(rows["ERTACache (Wan2.1 1.3B, slow)"].paper)["psnr_db"] == 23.77
    assert {row.block for row in rows.values()} == {"Wan2.1 1.3B, slow", "Wan2.1 1.3B, fast"}


def test_cogvideox_runs_without_the_adjustment():
    rows = {row.key: row for row in rows_of(TABLE, "cogvideox_2b", 50)}
    assert rows["ERTACache (CogVideoX 2B, fast)"].overrides == (
        "cache=ertacache", "cache.adjust_time=false", "cache.threshold=0.3",
    )  # fmt: skip


def test_open_sora_runs_at_the_printed_thresholds_and_ranges():
    """Mutants: a row that waits; PAB's ranges together with a budget, which is refused; its ranges on another model."""
    rows = {row.key: row for row in rows_of(TABLE, "open_sora_12", 30)}
    assert len(rows) == 10 and not any(row.why_not for row in rows.values())
    assert rows["ERTACache (Open-Sora 1.2, slow)"].overrides == ("cache=ertacache", "cache.threshold=0.1")
    assert rows["ERTACache (Open-Sora 1.2, fast)"].overrides == ("cache=ertacache", "cache.threshold=0.18")
    assert rows["GCache (Open-Sora 1.2, fast)"].computed == 11 and rows["TeaCache (Open-Sora 1.2, slow)"].computed == 19
    slow = rows["PAB, slow (Open-Sora 1.2, slow)"]
    assert slow.computed is None and "cache.options.temporal=4" in slow.overrides
    scaled = {row.key: row for row in rows_of(TABLE, "wan21_tiny", 50)}["PAB, slow (Open-Sora 1.2, slow)"]
    assert scaled.computed == 38 and scaled.options == ()


def test_another_model_stands_in_for_all_at_the_same_share_of_steps():
    """12 of 30 steps are 20 of 50, 2.25x are 22. Mutants: the printed number of steps; a printed threshold."""
    rows = {row.key: row for row in rows_of(TABLE, "wan21_tiny", 50)}
    assert len(rows) == 10 + 8 + 5
    assert rows["ERTACache (Open-Sora 1.2, fast)"].computed == 20
    assert rows["TeaCache (Open-Sora 1.2, fast)"].computed == 22
    assert all("threshold" not in part for row in rows.values() for part in row.overrides)
    assert rows["Δ-DiT (Open-Sora 1.2, slow)"].computed == 49 and rows["ERTACache (CogVideoX 2B, fast)"].options == ()


def test_claims_are_those_of_the_printed_numbers():
    """The closer one at no less speed-up. Mutants: a slower one that is closer; the claim turned round."""
    found = {(claim.better, claim.worse) for claim in claims_of(TABLE)}
    assert ("ERTACache", "TeaCache") in found and ("GCache", "ERTACache") in found
    assert ("TeaCache", "ERTACache") not in found and ("ERTACache", "ProfilingDiT") not in found
    images = {(claim.better, claim.worse) for claim in claims_of(paper.table("table2_image"))}
    assert images == {("ERTACache", "TeaCache"), ("GCache, slow", "ERTACache"), ("GCache, fast", "ERTACache")}
