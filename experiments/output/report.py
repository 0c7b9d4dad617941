"""`report.html`: one self-contained page with the clips of both arms playing side by side, in step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.page import film, render
from analysis.records import MainRecord

MAX_CLIPS = 200  # on the page, which holds them itself
FIGURES = {
    "step_map": "Computed and reused steps",
    "relative_l1": "How much the residual changes from step to step",
    "psnr_per_prompt": "PSNR of every prompt against its uncached twin",
    "psnr_per_frame": "PSNR by frame, over all prompts",
}
IMAGE_SCORES = {
    "fid_inception": "FID (Inception)",
    "fid_tinyclip": "FID (clip_tiny, not comparable elsewhere)",
    "clip_score_vit": "CLIP score",
    "clip_score_tinyclip": "CLIP score (clip_tiny, not comparable elsewhere)",
}


@dataclass(frozen=True)
class Headline:
    """A number that the page begins with."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Figure:
    """A picture of the run folder, as it lies in the page."""

    title: str
    data: str


def write(folder: Path, record: MainRecord, rows: list[dict[str, Any]]) -> None:
    """Write `folder`/report.html from the record, the figures and the clips that lie beside it."""
    figures = [
        Figure(title, film.data_uri(path.read_bytes(), "png"))
        for name, title in FIGURES.items()
        if (path := folder / "figures" / f"{name}.png").is_file()
    ]
    render.write(
        "report.html.j2",
        folder / "report.html",
        Path(__file__).parent,
        record=record,
        headlines=headlines(record, rows),
        gallery=film.gallery(folder, rows, MAX_CLIPS),
        summary=summary_rows(record),
        figures=figures,
        missing=not_evaluated(record),
    )


def headlines(record: MainRecord, rows: list[dict[str, Any]]) -> list[Headline]:
    """Speed-up, PSNR, and how many of the scenes that were right without a cache still are; SSIM where nobody can tell."""
    metrics, steps = record.metrics, record.steps
    timing, speedup = record.timing, f"{metrics['speedup_denoise']:.2f}×"
    psnr_db = _psnr(record, "psnr_db")
    known = [row["psnr_db"] for row in rows if row["psnr_db"] is not None]
    spread = f"{min(known):.1f} to {max(known):.1f}, " if len(known) > 1 else ""
    shown = [
        Headline("speed-up", speedup, f"of denoising; {metrics['speedup_pipeline']:.2f}× of the whole call"),
        Headline(
            "PSNR against uncached",
            f"{float(psnr_db):.1f} dB" if psnr_db[0].isdigit() else psnr_db,
            f"{spread}{len(rows)} prompt{'s' * (len(rows) > 1)}",
        ),
    ]
    right = [row["cached"]["scene"]["all"] for row in rows if (row["uncached"]["scene"] or {}).get("all")]
    if right:
        shown.append(
            Headline("scenes kept", f"{sum(right)} of {len(right)}", "as asked without a cache, and still with it")
        )
    else:
        shown.append(Headline("SSIM against uncached", f"{metrics['ssim']:.4f}", "1 is identical"))
    forwards = f"{timing.forwards:.4g} forwards a sample in place of {timing.forwards_uncached:g}"
    return [*shown, Headline("steps computed", f"{steps.computed:.4g} of {steps.uncached}", forwards)]


def not_evaluated(record: MainRecord) -> dict[str, str]:
    """What this bench asks for and could not evaluate, with the reason; not what only other benches can."""
    bench = record.config["bench"]
    never = ["scene_accuracy"] if record.config["model"].get("prompt_source") != "scenes" else []
    never += [] if bench.get("image_scores") else ["fid", "clip_score"]
    never += [] if bench.get("suite") == "standard" else ["vbench_"]
    return {
        name: reason or "no reason given"
        for name, reason in record.missing.items()
        if not name.startswith(tuple(never))
    }


def summary_rows(record: MainRecord) -> list[tuple[str, str, str]]:
    """The metrics as rows of (name, uncached, cached), for the terminal and the page."""
    metrics, timing, steps = record.metrics, record.timing, record.steps
    possible = metrics["speedup_possible"]
    rows = [
        ("steps computed", "", f"{steps.computed:.4g} of {steps.total}"),
        ("transformer forwards per sample", f"{timing.forwards_uncached:g}", f"{timing.forwards:.5g}"),
        ("denoising, median s", f"{timing.denoise_uncached_s:.3f}", f"{timing.denoise_s:.3f}"),
        ("whole call, median s", f"{timing.pipeline_uncached_s:.3f}", f"{timing.pipeline_s:.3f}"),
        ("speed-up of denoising", "", f"{metrics['speedup_denoise']:.2f}x"),
        ("  possible with these forwards", "", f"{possible:.2f}x"),
        ("speed-up of the whole call", "", f"{metrics['speedup_pipeline']:.2f}x"),
    ]
    if "speedup_realised" in metrics:
        rows.insert(
            -1, ("  of it realised: the rest is hook and slower steps", "", f"{metrics['speedup_realised']:.1%}")
        )
    where = " of mp4 files" if metrics.get("frames_from") == "mp4" else ""
    for key, name in (("psnr_db", "PSNR, dB"), ("psnr_frame_mean_db", "PSNR, dB, mean over frames")):
        if key in metrics:
            rows.append((name + where, "", _psnr(record, key)))
    for key, name in (("ssim", "SSIM"), ("ms_ssim", _ms_ssim_name(metrics)), ("lpips", "LPIPS (alex)")):
        if key in metrics:
            rows.append((name + where, "", f"{metrics[key]:.4f}"))
    for key, cached in metrics.get("scene_accuracy", {}).items():
        chance = metrics["scene_chance_level"].get(key)
        name = f"scene accuracy, {key}" + (f" (chance {chance:.0%})" if chance else "")
        rows.append((name, f"{metrics['scene_accuracy_uncached'][key]:.1%}", f"{cached:.1%}"))
    for key, cached in metrics.get("vbench", {}).items():
        rows.append((f"VBench {key}", f"{metrics['vbench_uncached'][key]:.4f}", f"{cached:.4f}"))
        if difference := metrics["vbench_difference"][key]:
            mean, low, high = (f"{difference[name]:+.4f}" for name in ("mean", "low", "high"))
            rows.append((f"  cached - uncached, {difference['videos']} videos", "", f"{mean} [{low}, {high}]"))
    for key in ("vbench_quality", "vbench_semantic", "vbench_total"):
        if key in metrics:
            name = f"VBench {key.removeprefix('vbench_')} score"
            rows.append((name, f"{metrics[key + '_uncached']:.2%}", f"{metrics[key]:.2%}"))
    for key, name in IMAGE_SCORES.items():
        if key in metrics:
            rows.append((name, f"{metrics[f'{key}_uncached']:.4g}", f"{metrics[key]:.4g}"))
        if f"{key}_to_uncached" in metrics:
            rows.append((f"{name}, against the uncached images", "", f"{metrics[f'{key}_to_uncached']:.4g}"))
    overhead = timing.hook_overhead_per_step_s
    shown = f"{1000 * overhead:.3f} ({timing.hook_overhead_of_forward:.2%} of a forward)"
    rows.append(("hook overhead per step, ms", "", "" if "hook_overhead" in record.missing else shown))
    rows.append(("cache, bytes", "", f"{record.memory.cache_bytes} {record.memory.cache_dtype or '(empty)'}"))
    return rows


def _psnr(record: MainRecord, key: str) -> str:
    """A mean PSNR. A cache that computed everything is not lossless: it did nothing."""
    if record.steps.without_reuse == record.timing.repeats > 0:
        return "did not reuse anything"
    psnr_db = record.metrics[key]
    return "identical" if psnr_db is None else f"{psnr_db:.2f}"


def _ms_ssim_name(metrics: dict[str, Any]) -> str:
    scales = len(metrics.get("ms_ssim_betas", ()))
    return "MS-SSIM" if scales == 5 else f"MS-SSIM ({scales} scales)"
