"""The results page: what it is made of, how it behaves in a browser, and what it says of bad folders."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from analysis import records
from analysis.page import __main__ as page
from analysis.page import results
from analysis.records import Claim
from tests.analysis.runs import FRAMES, HOSTILE, write_run
from tests.analysis.tables import one, row, table
from tests.analysis.test_paper import record
from tests.analysis.test_records import EARLIER
from tests.browser import opened


def comparison(**changes):
    """Three methods and the noise floor; the best PSNR is not that of the reference."""
    timed = {"uncached_s": 2.0}
    return table(
        [
            (row("uncached", None, group="none"), [one(None, forwards=12, ssim=1.0, **timed)] * 2),
            (row("ertacache", 3), [one(41.0, **timed), one(43.0, **timed)]),
            (row(HOSTILE, 3, group="online"), [one(9.5, denoise_s=0.5, **timed)] * 2),
            (row("fewer_steps", 3, group="none"), [one(100.25, denoise_s=0.8, **timed)] * 2),
            (row("absent", 3), []),
        ],
        left_out={"absent (3)": "needs " + "weights_that_nobody_has/" * 30},
        **changes,
    )


def as_data(folder):
    """A folder as `analysis/data`: a table, and clips of two models, one of them images."""
    (folder / "clips").mkdir(parents=True)
    made = comparison()
    made.record.table.claims = [
        Claim(text="ours is better", better="ertacache", worse="fewer_steps"),
        Claim(text="ours wins", better="ertacache", worse=HOSTILE, paper=HOSTILE),
    ]
    records.write_bundle(made, folder / "few.json.gz")
    write_run(folder / "clips" / "wan21_tiny", [HOSTILE, "x" * 4000], [40.0, None], "wan21_tiny")
    write_run(folder / "clips" / "flux_tiny", ["a star"], [50.0], "flux_tiny", frames=1)
    return folder


@pytest.fixture
def data(tmp_path):
    return as_data(tmp_path / "data")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of such a folder, with a decomposition."""
    folder = tmp_path_factory.mktemp("page")
    out = folder / "out" / "index.html"
    assert page.main([str(EARLIER / "decomposition"), "--out", str(out)], as_data(folder / "data")) == 0
    return out


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_quiet_and_fits(browser, made, width, scheme):
    """Every chart is drawn, all details open: nothing is fetched, nothing runs that a prompt or a title says."""
    with opened(browser, made, width, color_scheme=scheme) as shown:
        shown.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        charts = shown.page.locator(".chart .main-svg:first-child").count()
        assert charts == shown.page.locator(".chart").count() >= 4
        assert shown.is_quiet() and shown.sideways_px() == 0
        assert HOSTILE in shown.page.locator(".prompt").all_inner_texts()
        assert shown.page.locator("h3").all_inner_texts()[0].startswith("All methods: tiny, 2 held-out prompts")


@pytest.mark.slow
def test_clips_play_in_step_and_images_stand(browser, made):
    with opened(browser, made) as shown:
        seen = list(shown.frames_seen())
        assert all(len(set(frames[:6])) == 1 and frames[6:] == ["0px 0px"] * 3 for frames in seen)
        assert len({frames[0] for frames in seen}) == FRAMES
        assert shown.page.locator(".gallery").nth(1).locator(".play").count() == 0


def test_tables_are_sorted_by_number(browser, made):
    """100.25 is more than 41, which texts are not; rows without a number stay last, both ways."""
    with opened(browser, made) as shown:
        first = shown.page.locator("table.sortable").first
        heading = first.locator("th", has_text="PSNR")

        def column():
            return first.locator("tbody tr td:nth-child(4)").all_inner_texts()

        heading.locator("button").click()
        assert column()[:3] == ["100.25", "42.00", "9.50"] and heading.get_attribute("aria-sort") == "descending"
        heading.locator("button").click()
        assert column()[:3] == ["9.50", "42.00", "100.25"] and heading.get_attribute("aria-sort") == "ascending"
        first.locator("th button").first.click()
        assert first.locator("tbody tr td:first-child").all_inner_texts()[1] == "Ertacache"
        assert heading.get_attribute("aria-sort") is None


def test_a_point_says_what_it_is(browser, made):
    """Hover shows method, budget and interval."""
    with opened(browser, made) as shown:
        chart = shown.page.locator(".chart").first
        chart.scroll_into_view_if_needed()
        shown.page.evaluate("Plotly.Fx.hover(document.querySelector('.chart'), [{curveNumber: 1, pointNumber: 0}])")
        said = shown.page.locator(".hoverlayer .hovertext").first.text_content()
        assert "Ertacache" in said and "3 computed steps" in said and "42.0 dB [41.0, 43.0], 2.00×" in said


def test_without_javascript_tables_and_pictures_are_there(browser, made):
    with opened(browser, made, java_script_enabled=False) as shown:
        assert shown.page.locator("table.sortable").first.is_visible()
        assert shown.page.locator("noscript img").count() >= 3 and shown.page.locator("noscript img").first.is_visible()
        assert (
            "Without JavaScript" in shown.page.inner_text("main")
            and not shown.page.locator(".chart").first.is_visible()
        )
        assert shown.pixel(".uncached")[0] in {20, 60, 100, 140}


def test_claims_stand_with_their_verdicts(made):
    """As the intervals decide them, markup in them as text."""
    text = made.read_text(encoding="utf-8")
    assert text.count('<span class="chip bad">contradicted') == 1 and 'class="chip">reproduced' in text
    assert "PSNR dB +32.50" in text and HOSTILE not in text


def test_a_figure_of_the_paper_is_shown_with_its_claims(data):
    """Mutant: figure records passed over."""
    records.write_record(record("fig2b_trajectory_drift", [1.0, 2.0]), data / "fig2b.json.gz")
    found = results.gather(results.kept(data))
    (figure,) = found.figures
    assert figure.picture.startswith("data:image/png;base64,") and figure.title.startswith("Figure 2b")
    assert figure in found.claims and not found.problems


def test_of_every_model_the_larger_table_is_at_a_glance(data):
    """The best other row is named with what it gains; the reference is never the best other."""
    records.write_bundle(table([(row("ertacache", 3), [one(30.0)])]), data / "a_small.json.gz")
    found = results.gather(results.kept(data))
    (glance,) = found.glances
    assert glance.prompts == 2 and [run.model for run in found.runs] == ["wan21_tiny", "flux_tiny"]
    shown = {name: (value, note) for name, value, note in glance.glance}
    assert shown["Ertacache"][0] == "42.0 dB" and shown["speed-up"][0] == "2.00×"
    assert shown["best other: Fewer_Steps"] == ("100.2 dB", "+58.2 [+57.2, +59.2] dB against Ertacache")


def test_an_oracle_is_never_the_best_other(data):
    """It stands in the table under its own title. Mutant: the best row counts, whatever it has seen."""
    made = comparison()
    known = table([(row("oracle", 3, group="oracle", title="Fitted (oracle)"), [one(120.0), one(121.0)])])
    made = replace(
        made,
        record=replace(made.record, rows=[*made.record.rows, *known.record.rows]),
        samples=[*made.samples, *known.samples],
    )
    records.write_bundle(made, data / "few.json.gz")
    (glance,) = results.gather(results.kept(data)).glances
    shown = [name for name, _, _ in glance.glance]
    assert "best other: Fewer_Steps" in shown and not any("oracle" in name for name in shown)
    assert any("Fitted (oracle)" in line for section in glance.sections for line in section.lines)


def test_what_cannot_be_shown_is_named_after_the_rest_is_made(data, tmp_path, capsys):
    """A folder without a record, a truncated record, a run without its clips: exit code 1, and the page is there."""
    (tmp_path / "empty").mkdir()
    cut = write_run(tmp_path / "cut", ["a"], [40.0])
    text = (cut / "record.json").read_text()
    (cut / "record.json").write_text(text[: len(text) // 2])
    bare = write_run(tmp_path / "bare", ["a"], [40.0])
    (bare / "samples" / "cached" / "000.webp").unlink()
    out = tmp_path / "index.html"
    assert page.main([*map(str, (tmp_path / "empty", cut, bare)), "--out", str(out)], data) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    for line, name in zip(errors, ("empty", "cut", "bare"), strict=True):
        assert str(tmp_path / name) in line
    assert "Clips, without and with a cache" in out.read_text(encoding="utf-8")


def test_nothing_to_show_is_one_line_and_no_page(tmp_path, capsys):
    out = tmp_path / "index.html"
    assert page.main(["--out", str(out)], tmp_path / "nowhere") == 1
    assert capsys.readouterr().err == "error: nothing to show: name run folders of finished runs\n" and not out.exists()


def test_a_folder_of_runs_shows_them_all(data, tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "outputs" / name, ["a"], [40.0], name)
    assert {run.model for run in results.gather([tmp_path / "outputs"]).runs} == {"one", "two"}


def test_kept_clips_are_a_run_folder_without_paths_of_a_machine(tmp_path, capsys):
    """Eight pairs at most, the old ones gone; what is no such run is named and loses nothing."""
    run = write_run(tmp_path / "run", [f"prompt {k} \ud800" for k in range(10)], [40.0] * 10, "wan21_tiny")
    data = tmp_path / "data"
    for _ in range(2):
        assert page.main(["--keep-clips", str(run)], data) == 0
    target = data / "clips" / "wan21_tiny"
    assert capsys.readouterr().out.split() == [str(target)] * 2
    assert len(list(target.glob("samples/*/*.webp"))) == 16 and not list(target.glob("*.partial"))
    record = json.loads((target / "record.json").read_text(encoding="utf-8"))
    assert record["missing"] == {} and "/home/somebody" not in (target / "record.json").read_text(encoding="utf-8")
    assert len(results.gather([target]).runs[0].gallery.pairs) == 8
    (run / "samples" / "cached" / "003.webp").unlink()
    assert page.main(["--keep-clips", str(run)], data) == 1 and "003.webp" in capsys.readouterr().err
    assert len(list(target.glob("samples/*/*.webp"))) == 16
    assert page.main(["--keep-clips", str(EARLIER / "decomposition")], data) == 1
    assert "experiment=main" in capsys.readouterr().err


def test_the_repository_s_own_page():
    """What is committed can be shown whole, with eight pairs a model, and stays small."""
    found = results.gather(results.kept())
    assert not found.problems and {table.model for table in found.tables} == {"wan21_tiny", "flux_tiny"}
    assert [(run.model, len(run.gallery.pairs)) for run in found.runs] == [("wan21_tiny", 8), ("flux_tiny", 8)]
    assert sum(path.stat().st_size for path in (results.DATA / "clips").rglob("*") if path.is_file()) < 5_000_000
