"""TODO DOC"""

from __future__ import annotations

import numpy as np


def test_prompts_are_escaped_in_the_report(tmp_path):
    from experiments.output import report

    rows = [{"prompt": "<script>alert(1)</script>", "seed": 0, "psnr_db": None, "ssim": 1.0, "index": 0}]

    for arm in ("uncached", "cached"):
        rows[0][arm] = {"scene": None}
        (tmp_path / "samples" / arm).mkdir(parents=True)
        report.write_animation(np.zeros((2, 16, 16, 3)), tmp_path / "samples" / arm / "000.webp")
    steps = {"computed": 1, "total": 2}
    timing = dict.fromkeys(
        ["denoise_s", "denoise_uncached_s", "pipeline_s", "pipeline_uncached_s", "hook_overhead_per_step_s"], 1.0
    )
    timing |= {"hook_overhead_of_forward": 0.01, "forwards": 2, "forwards_uncached": 4}
    metrics = {"psnr_db": None, "ssim": 1.0, "speedup_denoise": 2.0, "speedup_possible": 2.0, "speedup_pipeline": 1.9}
    names = {"model": {"name": "m"}, "cache": {"name": "c"}, "bench": {"name": "b"}}
    record = {
        "config": names, "steps": steps, "timing": timing, "metrics": metrics, "missing": {}, "seeds": [0],
        "memory": {"cache_bytes": 0, "cache_dtype": ""}, "command": "x", "device": "CPU", "versions": {},
    }  # fmt: skip
    report.write(tmp_path, record, rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
