"""Made-up tables: rows, samples, records."""

from __future__ import annotations

from typing import Any

from analysis.records import Row, Rows, RowSetup, RowsRecord, Sample, Table

COLUMNS = ["forwards", "speedup", "psnr_db", "gain", "ssim", "lpips", "scene", "cache_bytes", "calibration_s"]


def one(psnr: float | None, **changes: Any) -> dict[str, Any]:
    """A sample's numbers."""
    values = {"forwards": 6, "denoise_s": 1.0, "uncached_s": None, "psnr_db": psnr, "ssim": 0.9}
    return {**values, "lpips": None, "scene": {"all": True}, "cache_bytes": 8, **changes}


def row(label: str, computed: int | None = 3, site: str | None = None, **changes: Any) -> Row:
    """A row at a budget."""
    where = ", ".join(str(part) for part in (site, computed) if part is not None)
    key = f"{label} ({where})" if where else label
    return Row(**{"key": key, "label": label, "title": label.title(), "method": label, "group": "planned", **changes},
               computed=computed, site=site)  # fmt: skip


def table(pairs: list[tuple[Row, list[dict[str, Any]]]], **changes: Any) -> Rows:
    """A table of these rows; `changes` are of the record or, named `left_out`, of what was not sampled."""
    left_out = changes.pop("left_out", {})
    prompts = max((len(made) for _, made in pairs), default=0)
    record = RowsRecord(
        **{
            "command": "python run.py", "git_commit": "abc", "versions": {}, "device": "CPU, 1 threads",
            "config": {"model": {"name": "tiny"}}, "config_hash": "0", "prompts": ["a circle"] * prompts,
            "seeds": list(range(prompts)), "experiment": "compare", "num_steps": 6, "noises": 1,
            "rows": [one_row for one_row, _ in pairs], "uncached_scene": [{"all": True}] * prompts,
            "table": Table(reference="ertacache", columns=COLUMNS, best_first=True, figures=["methods"]),
            **changes,
        }
    )  # fmt: skip
    made = [Sample(row=r.key, index=k, **sample) for r, taken in pairs for k, sample in enumerate(taken)]
    setups = {
        r.key: RowSetup(row=r.key, calibration_s=1.5, last_sigma=0.1, ran_on="CPU", commit="abc") for r, _ in pairs
    }
    return Rows(record=record, samples=made, setups=setups, left_out=left_out)
