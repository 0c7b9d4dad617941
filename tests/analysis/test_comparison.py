"""Outcomes of rows: paired differences, speed-ups of timed pairs, noises of a prompt, verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from analysis import tables
from analysis.comparison import Comparison, as_point
from analysis.records import Claim, RowScores, Table
from analysis.verdicts import CONTRADICTED, OPEN, REPRODUCED
from tests.analysis.tables import COLUMNS, one, row, table

ERTA, UNIFORM, FORA, NONE = row("ertacache"), row("uniform"), row("fora"), row("none", None)


def section(rows) -> tables.Section:
    (found,) = tables.sections(Comparison(rows))
    return found


def cells(rows, title: str) -> dict[str, str]:
    found = section(rows)
    (line,) = [line for line in found.lines if line[0] == title]
    return dict(zip(found.headings, line, strict=True))


def test_a_row_of_the_table():
    """Mutants: unpaired differences, the speed-up of other samples than the timed ones, or of one pair, means over what is missing."""
    timed = [one(33.0, denoise_s=1.0, uncached_s=2.0), one(43.0, denoise_s=9.0), one(41.0, uncached_s=2.0)]
    rows = table([(ERTA, [one(30.0), one(40.0), one(38.0, uncached_s=2.0)]), (UNIFORM, timed)])
    assert cells(rows, "Ertacache")["speed-up, measured"] == ""
    found = cells(rows, "Uniform")
    assert found["PSNR dB"] == "39.00" and found["against Ertacache (95 %)"] == "+3.00 [+3.00, +3.00]"
    assert found["speed-up, measured"] == "2.00x" and found["LPIPS"] == "" and found["scene, all"] == "100.0%"
    assert cells(rows, "Ertacache")["against Ertacache (95 %)"] == "" and found["calibration s"] == "2"
    assert [line[0] for line in section(rows).lines] == ["uncached", "Uniform", "Ertacache"]  # best first


def test_all_differences_are_paired():
    """Ratios of 2 and 4 against 1 and 2 where both were timed: +1 and +2; the third was timed on one side alone.

    Mutants: the difference of the medians over all timed prompts, medians for means, the reference among the rows.
    """
    reference = [one(30.0, uncached_s=1.0), one(40.0, uncached_s=2.0), one(50.0, uncached_s=90.0)]
    wrong = {"all": False}
    other = [
        one(31.0, ssim=0.8, uncached_s=2.0), one(42.0, ssim=0.7, uncached_s=4.0, scene=wrong), one(53.0, ssim=0.6),
    ]  # fmt: skip
    whole, idle = [one(None, forwards=12)] * 3, [one(None, forwards=12)] * 3
    rows = table([(NONE, whole), (ERTA, reference), (UNIFORM, other), (FORA, idle)])
    (line,) = section(rows).differences
    found = dict(zip(section(rows).paired, line[1:], strict=True))
    assert line[0] == "Uniform" and found["PSNR dB"].startswith("+2.00 [+1.") and found["LPIPS"] == ""
    assert found["SSIM"].startswith("-0.2000 [-0.") and found["scene, all"].startswith("-33.3%")
    assert found["speed-up"] == "+1.50 [+1.00, +2.00]"
    assert section(table([(NONE, whole), (UNIFORM, other)])).differences == []
    text = tables.as_markdown(rows)
    assert "Against Ertacache:" in text and "+1.50 [+1.00, +2.00]" in text and "sampled at commit abc, CPU." in text


def test_a_cache_that_computed_everything_says_so():
    """Mutants: such a row ranked by its perfect PSNR; a plan's grid without a cache, which computes all of fewer steps."""
    whole = [one(None, forwards=12)]
    rows = table([(NONE, whole), (FORA, whole), (UNIFORM, [one(40.0)])])
    assert cells(rows, "Fora")["forwards"] == "did not reuse anything"
    assert cells(rows, "Uniform")["forwards"] == "6" and cells(rows, "None")["PSNR dB"] == "identical"
    assert [line[0] for line in section(rows).lines] == ["uncached", "None", "Uniform", "Fora"]
    assert cells(rows, "uncached")["scene, all"] == "100.0%" and Comparison(rows).full_forwards == 12


def test_what_is_not_there_is_said():
    """Mutants: an unfinished row shown with the mean of what there is; its reason lost."""
    rows = table(
        [(ERTA, [one(30.0), one(40.0)]), (UNIFORM, [one(1.0)]), (FORA, [])], left_out={"fora (3)": "no modules"}
    )
    assert section(rows).not_run == [("Uniform", "not finished: 1 of 2 samples"), ("Fora", "no modules")]
    assert [line[0] for line in section(rows).lines] == ["uncached", "Ertacache"]


def test_noises_of_a_prompt_are_averaged_before_pairing():
    """Two prompts with two noises: gains of 1 and 3 by prompt, whatever the noises do. Mutant: four prompts."""
    ours = [one(10.0), one(20.0), one(14.0), one(28.0)]  # both prompts with the first noise, then with the second
    theirs = [one(11.0), one(19.0), one(11.0), one(23.0)]
    found = Comparison(table([(ERTA, theirs), (UNIFORM, ours)], noises=2))
    reference, other = found.outcomes
    np.testing.assert_allclose(other.by_prompt("psnr_db") - reference.by_prompt("psnr_db"), [1, 3])
    gain = other.gain("psnr_db", reference)
    assert (gain.mean, gain.low, gain.high) == (2, 1, 3)


def test_speedups_of_the_noise_that_was_timed():
    """A noise of each prompt was timed: 4 against 2. Mutants: nothing paired; noises not timed count as 0; one pair is enough."""
    ours = [one(10.0, uncached_s=4.0), one(20.0), one(14.0), one(28.0, uncached_s=4.0)]
    theirs = [one(11.0, uncached_s=2.0), one(19.0), one(11.0), one(23.0, uncached_s=2.0)]
    reference, other = Comparison(table([(ERTA, theirs), (UNIFORM, ours)], noises=2)).outcomes
    assert other.gain("speedup", reference).mean == 2 and other.speedup == 4
    once = Comparison(table([(ERTA, [*theirs[:3], one(23.0)]), (UNIFORM, ours)], noises=2)).outcomes
    assert once[1].gain("speedup", once[0]) is None and once[0].speedup is None


def test_points_of_the_figures():
    """Mutants: a row that computed everything, or was not sampled, drawn; the reference not told apart."""
    whole = [one(None, forwards=12)] * 2
    rows = [(NONE, whole), (ERTA, [one(30.0, uncached_s=2.0), one(32.0, uncached_s=2.0)]), (FORA, whole), (UNIFORM, [])]
    found = Comparison(table(rows))
    points = [as_point(outcome, found) for outcome in found.outcomes]
    assert [point is None for point in points] == [True, False, True, True]
    assert points[1] == {
        "title": "Ertacache", "group": "planned", "budget": 3, "psnr_db": 31.0, "low": 30.0, "high": 32.0,
        "speedup": 2.0, "is_reference": True, "median": 31.0, "worst": 30.0,
    }  # fmt: skip


def test_the_uncached_samples_stand_on_top_where_something_is_known_of_them():
    """A table without a row for the noise floor still says what the uncached samples show. Mutant: the line is gone."""
    rows = table([(ERTA, [one(30.0)])])
    assert section(rows).lines[0][0] == "uncached" and cells(rows, "uncached")["scene, all"] == "100.0%"
    assert section(table([(ERTA, [one(30.0)])], uncached_scene=[None])).lines[0][0] == "Ertacache"


def test_rows_are_compared_within_their_group():
    """Mutants: the reference of another site or budget, groups in another order."""
    rows = [
        (row("ertacache", k, site), [one(psnr)])
        for site, k, psnr in [("output", 3, 30.0), ("output", 2, 20.0), ("blocks", 3, 50.0)]
    ]
    rows += [(row("uniform", k, site), [one(psnr + 1)]) for site, k, psnr in [("output", 3, 30.0), ("blocks", 3, 50.0)]]
    found = tables.sections(Comparison(table(rows)))
    assert [one.title for one in found] == ["output, 3 of 6 steps", "output, 2 of 6 steps", "blocks, 3 of 6 steps"]
    assert [[line[1] for line in one.differences] for one in found] == [
        ["+1.00 [+1.00, +1.00]"],
        [],
        ["+1.00 [+1.00, +1.00]"],
    ]


@pytest.mark.parametrize(
    ("gains", "said"),
    [([1.0, 1.2, 0.8], REPRODUCED), ([-1.0, -1.2, -0.8], CONTRADICTED), ([1.0, -1.0, 0.1], OPEN)],
)
def test_verdicts(gains, said):
    """Mutants: better and worse swapped, the verdicts swapped, an interval that holds zero taken for a result."""
    claims = [
        Claim(text="the policy helps", better="policy", worse="uniform"),
        Claim(text="time helps", better="time", worse="uniform"),
        Claim(text="nothing", better="gone", worse="uniform"),
    ]
    worse = [30.0, 20.0, 25.0]
    rows = [
        (row("uniform", 3, "output"), [one(value) for value in worse]),
        (row("policy", 3, "output"), [one(value + gain) for value, gain in zip(worse, gains, strict=True)]),
        (row("time", 3, "output"), [one(value) for value in worse]),
    ]
    found = Comparison(table(rows, table=Table(reference="policy", columns=COLUMNS, claims=claims))).results()
    assert [one.verdict for one in found] == [said, OPEN]
    assert found[0].claim == "the policy helps" and found[0].delta.startswith(f"PSNR dB {np.mean(gains):+.2f} [")
    assert found[1].ours == "25.00 against 25.00" and found[1].delta == "PSNR dB +0.00 [+0.00, +0.00]"
    assert found[0].command == "python run.py"


def test_as_good_as_allows_a_margin_and_less_is_better_of_lpips():
    """Behind by 0.4: as good within 0.5, not within 0.3. Mutants: the margin's sign; LPIPS the wrong way round."""

    def said(margin: float, metric: str = "psnr_db") -> str:
        claim = Claim(text="as good", better="few", worse="many", margin=margin, metric=metric)
        few = [one(29.6, lpips=0.1), one(39.6, lpips=0.2)]
        rows = [(row("few"), few), (row("many"), [one(30.0, lpips=0.3), one(40.0, lpips=0.5)])]
        (found,) = Comparison(table(rows, table=Table(reference="few", columns=COLUMNS, claims=[claim]))).results()
        return found.verdict

    assert (said(0.5), said(0.3), said(0.0, "lpips")) == (REPRODUCED, CONTRADICTED, REPRODUCED)


def test_blocks_are_compared_within_and_printed_numbers_stand_beside():
    """Rows of other budgets in one block, and the paper's numbers of both. Mutant: a claim decided across blocks."""
    claim = Claim(text="ours is closer", better="ours", worse="theirs")

    def place(label: str, block: str, psnr: float) -> tuple:
        changes = {"key": f"{label} ({block})", "block": block, "paper": {"psnr_db": psnr}}
        return row(label, 3 if label == "ours" else 2, **changes)

    rows = table(
        [
            (row("none", None), [one(None, forwards=12)] * 2),
            (place("ours", "A", 23.0), [one(30.0), one(31.0)]),
            (place("theirs", "A", 16.0), [one(20.0), one(21.0)]),
            (place("theirs", "B", 16.0), [one(50.0), one(51.0)]),
        ],
        table=Table(reference="ours", columns=["psnr_db", "paper_psnr_db"], claims=[claim], source="the paper"),
    )
    (found,) = Comparison(rows).results()
    assert found.claim == "ours is closer (A)" and found.paper == "23.00 against 16.00 (+7.00)"
    text = tables.as_markdown(rows)
    assert "## A\n" in text and "| Ours | 30.50 | 30.5 | 30.0 | 0% | 23.00 |" in text and "printed in the paper" in text


def test_scores_of_a_benchmark_are_columns_and_decide():
    """Mutants: another row's score; a metric's mean over nothing."""
    claim = Claim(text="better text match", better="ours", worse="theirs", metric="clip_score")
    rows = table(
        [(row("ours"), [one(30.0), one(31.0)]), (row("theirs"), [one(30.0), one(31.0)])],
        table=Table(reference="ours", columns=["fid", "clip_score"], claims=[claim]),
    )
    rows.scores = {
        "ours (3)": RowScores(row="ours (3)", whole={"fid": 0.5}, by_sample={"clip_score": [31.0, 33.0]}),
        "theirs (3)": RowScores(row="theirs (3)", by_sample={"clip_score": [30.0, 32.0]}),
    }
    assert cells(rows, "Ours") == {"method": "Ours", "FID": "0.5000", "CLIP score": "32.00"}
    assert cells(rows, "Theirs")["FID"] == ""
    assert Comparison(rows).results()[0].delta == "CLIP score +1.00 [+1.00, +1.00]"


def test_flips_median_and_worst_stand_beside_the_mean():
    """Two outcomes below 30 dB or read otherwise, of four; identical ones are above all. Mutants: a flip by the mean, the scene
    of the asked-for in place of the uncached one's, identical samples as 0 dB."""
    wrong = {"all": False}
    made = [one(20.0), one(50.0, scene=wrong), one(60.0, scene=wrong), one(None)]
    uncached = [{"all": True}, {"all": True}, wrong, {"all": True}]
    rows = table([(ERTA, made)], uncached_scene=uncached)
    found = cells(rows, "Ertacache")
    assert (found["median"], found["worst"], found["flips"]) == ("55.0", "20.0", "50%")
    same = cells(table([(ERTA, [one(None)] * 3)]), "Ertacache")
    assert (same["median"], same["worst"], same["flips"]) == ("", "", "0%")
