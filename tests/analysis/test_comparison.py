"""TODO DOC"""

from __future__ import annotations

from experiments.harness import comparison
from experiments.harness.rows import Row


def one(psnr: float | None, **changes) -> dict:
    values = {"forwards": 6, "denoise_s": 1.0, "uncached_s": None, "psnr_db": psnr, "ssim": 0.9}
    return {**values, "lpips": None, "scene": True, "cache_bytes": 8, **changes}


def test_a_row_of_the_table():
    """Mutants: unpaired differences, the speed-up of other samples than the timed ones, means over what is missing."""
    reference = comparison.Outcome(Row("ertacache", (), 3), [one(30.0), one(40.0)])
    timed = [one(33.0, denoise_s=1.0, uncached_s=2.0), one(43.0, denoise_s=9.0)]
    outcome = comparison.Outcome(Row("uniform", (), 3), timed, calibration_s=1.5)
    assert outcome.speedup == 2.0
    cells = dict(zip(comparison.COLUMNS, comparison.cells(outcome, reference, 12), strict=True))
    assert cells["PSNR dB"] == "38.00" and cells["against ertacache (95 %)"] == "+3.00 [+3.00, +3.00]"
    assert cells["speed-up, measured"] == "2.00x" and cells["LPIPS"] == "" and cells["scene, all"] == "100.0%"
    assert comparison.cells(reference, reference, 12)[4] == "" and cells["calibration s"] == "2"
    point = comparison.point(outcome, reference)
    assert point["against_ertacache"]["psnr_db"] == [3, 3, 3] and point["against_ertacache"]["scene"] == [0, 0, 0]
    assert "lpips" not in point["against_ertacache"] and point["calibration_s"] == 1.5


def test_all_differences_are_paired():
    """Ratios of 2 and 4 against 1 and 2 where both were timed: +1 and +2; the third was timed on one side alone.

    Mutants: the difference of the medians over all timed prompts, medians for means, the reference among the rows.
    """
    reference = comparison.Outcome(
        Row("ertacache", (), 3),
        [one(30.0, uncached_s=1.0), one(40.0, uncached_s=2.0), one(50.0, uncached_s=90.0)],
    )
    row = comparison.Outcome(
        Row("uniform", (), 3),
        [one(31.0, ssim=0.8, uncached_s=2.0), one(42.0, ssim=0.7, uncached_s=4.0, scene=False), one(53.0, ssim=0.6)],
    )
    idle = comparison.Outcome(Row("fora", (), 3), [one(None, forwards=12)] * 3)
    whole = comparison.Outcome(Row("none", (), None), [one(None, forwards=12)] * 3)
    (line,) = comparison.differences([whole, reference, row, idle], 3)
    cells = dict(zip(comparison.DIFFERENCES, line, strict=True))
    assert cells["method"] == "uniform" and cells["PSNR dB"].startswith("+2.00 [+1.") and cells["LPIPS"] == ""
    assert cells["SSIM"].startswith("-0.2000 [-0.") and cells["scene, all"].startswith("-33.3%")
    assert cells["speed-up"] == "+1.50 [+1.00, +2.00]"
    assert comparison.differences([whole, row], 3) == []
    pair = [reference, row]
    paired = {3: comparison.differences(pair, 3)}
    text = comparison.as_markdown("m", comparison.tabulate(pair), paired, pair)
    assert "Against ertacache:" in text and "+1.50 [+1.00, +2.00]" in text


def test_a_cache_that_computed_everything_says_so():
    """Mutants: such a row ranked by its perfect PSNR; a plan's grid without a cache, which computes all of fewer steps."""
    idle = comparison.Outcome(Row("taylorseer", (), 3), [one(None, forwards=12)])
    assert comparison.cells(idle, None, 12)[1] == "did not reuse anything"
    assert comparison.cells(comparison.Outcome(Row("plan_grid", (), 3), [one(40.0)]), None, 12)[1] == "6.0"
    whole = comparison.Outcome(Row("none", (), None), [one(None, forwards=12)])
    table = comparison.tabulate([whole, comparison.Outcome(Row("fora", (), 3), [one(40.0)])], 0.75)[3]
    assert [line[0] for line in table] == ["uncached", "none: uncached again", "fora"] and table[0][7] == "75.0%"
    assert comparison.cells(whole, None, 12)[3] == "identical" and comparison.full_forwards([idle, whole]) == 12
