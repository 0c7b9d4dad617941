"""The report escapes what it shows, and its rows say what was measured."""

from __future__ import annotations

import numpy as np

from analysis.records import MainRecord, Memory, Steps, Timing
from experiments.output import clips, report


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


def test_prompts_are_escaped_in_the_report(tmp_path):
    rows = [{"prompt": "<script>alert(1)</script>", "seed": 0, "psnr_db": None, "ssim": 1.0, "index": 0}]
    for arm in ("uncached", "cached"):
        rows[0][arm] = {"scene": None}
        (tmp_path / "samples" / arm).mkdir(parents=True)
        clips.write_animation(np.zeros((2, 16, 16, 3)), tmp_path / "samples" / arm / "000.webp")
    report.write(tmp_path, record(), rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_what_was_realised_is_a_row_where_it_was_measured():
    """Mutant: a share invented where another library's hooks do not tell their own time."""
    names = [name.strip() for name, _, _ in report.summary_rows(record())]
    assert "possible with these forwards" in names and not any("realised" in name for name in names)
    shown = {name.strip(): value for name, _, value in report.summary_rows(record(speedup_realised=0.991))}
    assert next(value for name, value in shown.items() if "realised" in name) == "99.1%"
