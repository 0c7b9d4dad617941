"""The report of a run: what it says, and how it behaves in a browser."""

from __future__ import annotations

import json

import numpy as np
import pytest

from analysis.records import MainRecord, Memory, Steps, Timing
from experiments.output import clips, report
from tests.browser import opened
from tests.commands import folders

FRAMES = 4
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def record(**metrics) -> MainRecord:
    seconds = ("denoise_s", "denoise_uncached_s", "pipeline_s", "pipeline_uncached_s", "forward_s", "solver_step_s")
    seconds += ("calibration_s", "hook_overhead_per_step_s", "hook_overhead_of_forward")
    return MainRecord(
        command="x", git_commit=None, versions={}, device="CPU", config_hash="0",
        config={"model": {"name": "m"}, "cache": {"name": "c"}, "bench": {"name": "b"}},
        prompts=["a circle"], seeds=[0], steps=Steps(total=2, computed=1, mask=[1, 0], uncached=2), sigmas=[1.0, 0.5, 0.0],
        timing=Timing(**dict.fromkeys(seconds, 1.0), forwards=2, forwards_uncached=4, repeats=1),
        memory=Memory(cache_bytes=0, cache_dtype="", peak_bytes=1), missing={}, plan_report={},
        metrics={"psnr_db": None, "ssim": 1.0, "speedup_denoise": 2.0, "speedup_possible": 2.0, "speedup_pipeline": 1.9, **metrics},
    )  # fmt: skip


def write(folder, prompts, psnr_db, scenes=None):
    """A report whose uncached clips are flat: frame k has the grey level 40 k + 20; cached ones lie 3 levels above."""
    rows = []
    for index, prompt in enumerate(prompts):
        rows.append({"prompt": prompt, "seed": index, "psnr_db": psnr_db[index], "ssim": 1.0, "index": index})
        for arm, above in (("uncached", 0), ("cached", 3)):
            rows[-1][arm] = {
                "scene": None if scenes is None else {"shape": scenes[arm][index], "all": scenes[arm][index]}
            }
            (folder / "samples" / arm).mkdir(parents=True, exist_ok=True)
            levels = np.arange(FRAMES)[:, None, None, None] * 40.0 + 20 + above
            frames = np.broadcast_to(levels / 255, (FRAMES, 48, 64, 3))
            clips.write_animation(frames, folder / "samples" / arm / f"{index:03d}.webp")
    report.write(folder, record(), rows)
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
    long = record(vbench={"temporal_flickering": 0.98}, vbench_uncached={"temporal_flickering": 0.98})
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
        seen = set()
        for _ in range(12):
            frames = shown.shown_frames()
            assert len(frames) == 9 and len(set(frames)) == 1
            seen.add(frames[0])
            shown.page.wait_for_timeout(70)
        assert len(seen) == FRAMES
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
    shown = {one.name: one for one in report.headlines(record(psnr_db=40.04), rows)}
    assert shown["scenes kept"].value == "2 of 3" and shown["speed-up"].value == "2.00×"
    assert shown["PSNR against uncached"].value == "40.0 dB" and "30.0 to 50.0" in shown["PSNR against uncached"].note
    assert "cached wrong: shape" in page.read_text() and "SSIM against uncached" not in shown


def test_only_what_the_bench_asks_for_is_missing():
    """A VBench run is not told that another bench gives FID, or that other prompts give a total."""
    one = record()
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
    r"""Half a surrogate pair has no bytes, `$\foo$` is no formula. Mutants: `encoding="utf-8"` in report, lines or record."""
    texts = ["a \ud800 circle", "costs $5, $\\foo$", HOSTILE]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    code, printed = command("bench.prompts=p.jsonl", "bench=fidelity", "model.embedded=false", "cache=uniform")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    rows = [json.loads(line) for line in (folder / "per_prompt.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == texts
    assert json.loads((folder / "record.json").read_text(encoding="utf-8"))["prompts"] == texts
    assert "a \\ud800 circle" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_was_realised_is_a_row_where_it_was_measured():
    """Mutant: a share invented where another library's hooks do not tell their own time."""
    names = [name.strip() for name, _, _ in report.summary_rows(record())]
    assert "possible with these forwards" in names and not any("realised" in name for name in names)
    shown = {name.strip(): value for name, _, value in report.summary_rows(record(speedup_realised=0.991))}
    assert next(value for name, value in shown.items() if "realised" in name) == "99.1%"
