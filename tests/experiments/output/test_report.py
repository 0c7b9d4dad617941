"""The report of a run: what it says, and how it behaves in a browser."""

from __future__ import annotations

import json

import pytest

from experiments.output import report
from tests.analysis.runs import FRAMES, HOSTILE, main_record, write_clips
from tests.browser import opened
from tests.commands import folders


def write(folder, prompts, psnr_db, scenes=None):
    """A report and the lines that it is made of."""
    rows = write_clips(folder, prompts, psnr_db, scenes)
    report.write(folder, main_record(), rows)
    return folder / "report.html", rows


def test_what_prompts_say_does_nothing(browser, tmp_path):
    """Escaped in the file, and shown as text. Mutant: `prompt | safe`."""
    page, _ = write(tmp_path, [HOSTILE], [40.0])
    assert "<script>alert" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    with opened(browser, page) as shown:
        assert shown.is_quiet() and shown.page.inner_text(".prompt") == HOSTILE


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    """Not a word of 5,000 letters, nor the long paths of what was not evaluated."""
    page, rows = write(tmp_path, ["x" * 5000, "a circle"], [40.0, None])
    long = main_record(vbench={"temporal_flickering": 0.98}, vbench_uncached={"temporal_flickering": 0.98})
    long.metrics["vbench_difference"] = {"temporal_flickering": {"mean": 0, "low": 0, "high": 0, "videos": 8}}
    long.missing = {"lpips": "weights not found: /" + "very_long_name/" * 40}
    long.command = "python run.py bench.prompts=" + "folder/" * 60
    report.write(tmp_path, long, rows)
    with opened(browser, page, width) as shown:
        shown.page.click("summary")
        assert shown.is_quiet() and shown.sideways_px() == 0
        assert shown.page.inner_text("details").count("very_long_name") == 40


def test_clips_play_in_step(browser, tmp_path):
    """All films show the same frame at any moment, and not always the same. Mutant: each starts with its own picture."""
    page, _ = write(tmp_path, ["a", "b", "c"], [40.0, 50.0, 30.0])
    with opened(browser, page) as shown:
        seen = list(shown.frames_seen())
        assert all(len(frames) == 9 and len(set(frames)) == 1 for frames in seen)
        assert len({frames[0] for frames in seen}) == FRAMES
        shown.page.click(".play")
        before = shown.shown_frames()
        shown.page.select_option(".sort", "worst")  # cards move, and go on where they were
        shown.page.wait_for_timeout(200)
        assert shown.shown_frames() == before and shown.page.inner_text(".play") == "Play"


def test_difference_is_that_of_the_pixels(browser, tmp_path):
    """3 grey levels, 50 times as bright, are 150; chosen by the page, and changed on it."""
    page, _ = write(tmp_path, ["a"], [40.0])
    with opened(browser, page) as shown:
        shown.page.click(".play")
        shown.page.evaluate("document.getAnimations().forEach((film) => { film.currentTime = 130; })")
        assert shown.pixel(".uncached") == (60,) * 3 and shown.pixel(".cached") == (63,) * 3
        assert shown.pixel(".difference") == (150,) * 3 and shown.page.inner_text(".times") == "50"
        shown.page.select_option(".factor", "20")
        assert shown.pixel(".difference") == (60,) * 3 and shown.page.inner_text(".times") == "20"


def test_pairs_are_sorted_by_psnr(browser, tmp_path):
    """Identical pairs are the best; equal ones keep their order."""
    page, _ = write(tmp_path, ["a", "b", "c", "d"], [40.0, None, 30.0, None])
    order = {"worst": "cabd", "best": "bdac", "index": "abcd"}
    with opened(browser, page) as shown:
        for choice, expected in order.items():
            shown.page.select_option(".sort", choice)
            assert "".join(shown.page.locator(".prompt").all_inner_texts()) == expected


def test_without_javascript_clips_play_and_tables_are_read(browser, tmp_path):
    page, _ = write(tmp_path, ["a"], [40.0])
    with opened(browser, page, java_script_enabled=False) as shown:
        assert shown.page.locator("table").is_visible() and not shown.page.locator(".tools").is_visible()
        levels = set()
        for _ in range(12):
            levels.add(shown.pixel(".uncached"))
            shown.page.wait_for_timeout(60)
        assert len(levels) > 1 and levels <= {(20 + 40 * k,) * 3 for k in range(FRAMES)}


def test_headlines_count_the_scenes_that_were_kept(tmp_path):
    """Of three that are right without a cache one is lost; one that was wrong before does not count."""
    scenes = {"uncached": [True, True, True, False], "cached": [True, False, True, True]}
    page, rows = write(tmp_path, list("abcd"), [40.0, 30.0, None, 50.0], scenes)
    shown = {one.name: one for one in report.headlines(main_record(psnr_db=40.04), rows)}
    assert shown["scenes kept"].value == "2 of 3" and shown["speed-up"].value == "2.00×"
    assert shown["PSNR against uncached"].value == "40.0 dB" and "30.0 to 50.0" in shown["PSNR against uncached"].note
    assert "cached wrong: shape" in page.read_text() and "SSIM against uncached" not in shown


def test_only_what_the_bench_asks_for_is_missing():
    """A VBench run is not told that another bench gives FID, or that other prompts give a total."""
    one = main_record()
    one.missing = {
        "lpips": "no weights",
        "vbench.dynamic_degree": "no weights",
        "vbench_total": "needs VBench's own prompts",
        "fid_inception": "other bench",
        "clip_score_vit": "other bench",
        "scene_accuracy": "not of the scene world",
    }
    assert list(report.not_evaluated(one)) == ["lpips", "vbench.dynamic_degree"]
    one.config = {"model": {"prompt_source": "scenes"}, "bench": {"image_scores": True, "suite": "standard"}}
    assert list(report.not_evaluated(one)) == list(one.missing)


def test_odd_text_in_prompts_loses_no_run(command, tmp_path):
    r"""`$\foo$` is no formula, markup is no markup. Mutant: text put into the page as it is."""
    texts = ["costs $5, $\\foo$", HOSTILE]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    code, printed = command(
        "bench.prompts=p.jsonl", "bench.num_prompts=2", "bench=fidelity", "model.embedded=false", "cache=uniform"
    )
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    rows = [json.loads(line) for line in (folder / "per_prompt.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == texts
    assert json.loads((folder / "record.json").read_text(encoding="utf-8"))["prompts"] == texts
    assert "costs $5, $\\foo$" in (page := (folder / "report.html").read_text(encoding="utf-8")) and HOSTILE not in page


def test_what_was_realised_is_a_row_where_it_was_measured():
    """Mutant: a share invented where another library's hooks do not tell their own time."""
    names = [name.strip() for name, _, _ in report.summary_rows(main_record())]
    assert "possible with these forwards" in names and not any("realised" in name for name in names)
    shown = {name.strip(): value for name, _, value in report.summary_rows(main_record(speedup_realised=0.991))}
    assert next(value for name, value in shown.items() if "realised" in name) == "99.1%"
