"""The main job: uncached and cached runs on the same prompts and seeds, metrics, record, figures, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from analysis import plots
from analysis.records import MainRecord
from experiments.bench import images
from experiments.bench.vbench import evaluation
from experiments.harness.arm import Arm, make_arm
from experiments.harness.pair import ARMS, sample_all, summarise
from experiments.harness.setup import Setup
from experiments.harness.steps import profile, step_table
from experiments.models.load import check_vocabulary
from experiments.output import console, ranks, report, tracking
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs, finish
from experiments.prompts.choose import test_prompts


def run(cfg: DictConfig, folder: Path) -> None:
    """Everything from the weights to the report. A second call goes on after the last finished prompt."""
    if cfg.bench.image_scores:
        images.check(cfg)
    vbench = evaluation.prepare(cfg)
    prompts = vbench.suite.prompts(cfg.seed) if vbench.suite else test_prompts(cfg)
    setup = Setup(cfg)
    if cfg.model.embedded:
        check_vocabulary(setup.pipe, [prompt.text for prompt in prompts])
    arm = make_arm(setup)
    ranks.same(lambda: check_inputs(folder, describe_inputs(setup.pipe, prompts, arm.calibration)))
    if arm.plan is not None and ranks.is_first():
        arm.plan.save(folder / "plan.json")
    vbench.check()
    with tracking.start(cfg, folder) as tracker:
        rows = sample_all(setup, arm, prompts, folder, tracker)
        names = {evaluation.clip_name(prompt, index): prompt.text for index, prompt in enumerate(prompts)}
        vbench.score({name: folder / "samples" / name for name in ARMS}, names, folder)
        scores = [vbench.summarise(), images.scores_of(cfg, folder, prompts)]
        if not ranks.is_first():
            return
        record = summarise(setup, arm, prompts, rows, scores)
        _draw(arm, rows, record, folder)
        report.write(folder, record, rows)
        finish(folder, record)
        _track(tracker, arm, rows, record, folder)
    _print_summary(record, folder)


def _draw(arm: Arm, rows: list[dict[str, Any]], record: MainRecord, folder: Path) -> None:
    figures, mask = folder / "figures", record.steps.mask
    figures.mkdir(exist_ok=True)
    drawn: list[Callable[[], None]] = [
        lambda: plots.step_map(mask, record.sigmas, figures / "step_map.png"),
        lambda: plots.psnr_per_prompt(rows, figures / "psnr_per_prompt.png"),
        lambda: plots.contact_sheet(folder / "samples", rows, figures / "contact_sheet.png"),
    ]
    if len(rows[0]["frames"]["psnr_db"]) > 1 and not record.metrics["identical"]:
        drawn.append(lambda: plots.psnr_per_frame(rows, figures / "psnr_per_frame.png"))
    if (calibration := arm.calibration) is not None:
        drawn.append(lambda: plots.change_profile(*profile(calibration), mask, figures / "relative_l1.png"))
    with console.progress_bar() as bar:
        for draw in bar.track(drawn, description="figures"):
            draw()


def _track(tracker: tracking.Tracker, arm: Arm, rows: list[dict[str, Any]], record: MainRecord, folder: Path) -> None:
    """What the run comes to for W&B: its steps, its first clips, its figures, its metrics."""
    tracker.table("steps", *step_table(record.steps.mask, record.sigmas, arm))
    for row in rows[: tracking.SHOWN_PAIRS]:
        sides = {name: folder / "samples" / name / f"{row['index']:03d}.webp" for name in ARMS}
        tracker.media(f"clips/{row['index']:03d}", sides, row["prompt"])
    tracker.figures(folder / "figures")
    tracker.finish({**record.metrics, "timing": vars(record.timing), "memory": vars(record.memory)})


def _print_summary(record: MainRecord, folder: Path) -> None:
    console.table("result", ["", "uncached", "cached"], report.summary_rows(record))
    idle = record.steps.without_reuse
    if idle:
        console.note(f"did not reuse anything: {idle} of {record.timing.repeats} samples, every step was computed")
    for name, reason in report.not_evaluated(record).items():
        console.note(f"not evaluated: {name} ({reason})")
    console.note(f"report: {folder / 'report.html'}")
