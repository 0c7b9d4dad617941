"""`report.html`: one self-contained page with the clips of both arms playing side by side."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from analysis.records import MainRecord

MAX_CLIPS = 200  # on the page, which holds them itself
FIGURE_TITLES = {
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


def write(folder: Path, record: MainRecord, rows: list[dict[str, Any]]) -> None:
    """Write `folder`/report.html from the record, the figures and the clips that lie beside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(default=True), trim_blocks=True
    )
    figures = [
        {"title": title, "data": _data_uri(folder / "figures" / f"{name}.png")}
        for name, title in FIGURE_TITLES.items()
        if (folder / "figures" / f"{name}.png").is_file()
    ]
    clips = [
        {
            "prompt": row["prompt"],
            "seed": row["seed"],
            "psnr": "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.2f} dB",
            "ssim": f"{row['ssim']:.4f}",
            **{
                arm: {
                    "data": _data_uri(folder / "samples" / arm / f"{row['index']:03d}.webp"),
                    "wrong": _wrong(row[arm]["scene"]),
                }
                for arm in ("uncached", "cached")
            },
        }
        for row in rows[:MAX_CLIPS]
    ]
    page = environment.get_template("report.html.j2").render(
        record=record, summary=summary_rows(record), clips=clips, figures=figures, num_prompts=len(rows)
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


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


def _wrong(scene: dict[str, bool] | None) -> str:
    if scene is None:
        return ""
    wrong = [key for key, right in scene.items() if not right and key != "all"]
    return "wrong: " + ", ".join(wrong) if wrong else "as asked" if scene["all"] else "an object too many"


def _data_uri(path: Path) -> str:
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
