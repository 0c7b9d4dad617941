"""`python run.py experiment=train_tiny model=…`: an embedded model, part by part, then its pipeline folder.

Every part goes on from its last checkpoint in `train_tiny.work_dir`; a finished part is not trained again.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.bench.scene import scene_agreement
from experiments.harness.calibrations import make_calibration
from experiments.harness.generate import generate
from experiments.harness.setup import Setup
from experiments.models.call import call_kwargs
from experiments.models.load import ASSETS
from experiments.output import console, tracking
from experiments.output.clips import to_uint8
from experiments.output.files import read_json, read_lines, read_object, write_json
from experiments.output.provenance import source_digest
from experiments.output.run_folder import STATE_FILE, check_inputs, goes_on, mark_finished
from experiments.prompts.choose import Prompt, test_prompts
from experiments.training import train_images, train_video

TRAINERS = {"WanPipeline": train_video, "FluxPipeline": train_images}
SHEET_PROMPTS = 12
SHEET_STEPS = 25
NEEDED_BYTES = 600_000_000  # latents, checkpoints while they are written, sheets


def run(cfg: DictConfig, folder: Path) -> None:
    """Train what is not trained yet, and install the pipeline under erta/assets with its calibration."""
    trainer = TRAINERS.get(cfg.model.pipeline)
    if not cfg.model.embedded or trainer is None:
        raise ErtaError(f"experiment=train_tiny trains embedded models, and model={cfg.model.name} is not one")
    until = cfg.train_tiny.until or trainer.PARTS[-1]
    if until not in trainer.PARTS:
        raise ErtaError(f"train_tiny.until must be one of {', '.join(trainer.PARTS)}, not {until!r}")
    name = cfg.model.name + ("" if cfg.model.world == "plain" else f"_{cfg.model.world}")
    work = Path(cfg.train_tiny.work_dir or Path.home() / ".cache" / "erta" / "train" / name).expanduser()
    check_source(cfg, work)
    console.note(f"checkpoints, curves and sample sheets: {work}")
    prompts = test_prompts(cfg)[:SHEET_PROMPTS]
    told: dict[Path, int] = {}

    def sheet(pipe: Any, step: int) -> None:
        kwargs = {**call_kwargs(cfg), "num_inference_steps": SHEET_STEPS}
        picture = work / f"sheet_{step:06d}.png"
        right = draw_sheet(pipe, prompts, kwargs, picture)
        log_curves(tracker, work, told)
        tracker.log({"step": step, "right": right, "of": len(prompts)}, "sheet")
        tracker.media("sheet", {"samples": picture}, f"step {step}")
        console.note(f"step {step}: {right} of {len(prompts)} samples show all that was asked for")

    with tracking.start(cfg, folder) as tracker:
        pipe = trainer.train(cfg, work, until, sheet)
        log_curves(tracker, work, told)
        tracker.finish()
    if pipe is None:
        return
    if not cfg.train_tiny.install:
        pipe.save_pretrained(work / "pipeline")
        console.note(f"written: {work / 'pipeline'} (model.path={work / 'pipeline'} model.world={cfg.model.world})")
        mark_finished(folder)
        return
    curves = {str(path.parent.relative_to(work)).replace("/", "-"): path for path in work.glob("**/curve.jsonl")}
    install(cfg, pipe, curves)
    if (work / "clip" / "clip").is_dir():
        clip = ASSETS / "clip_tiny"
        shutil.rmtree(clip, ignore_errors=True)
        shutil.copytree(work / "clip" / "clip", clip)
        console.note(f"installed: {clip}")
    mark_finished(folder)


def check_source(cfg: DictConfig, work: Path) -> None:
    """Checkpoints go on under the code that they began with, that of the scenes and of the training, and on their world.

    `resume=false` lays them aside, as `FOLDER.before-…`, and `resume=force` goes on. Raises ErtaError if the code or
    the world changed, or where the disk is too full.
    """
    if not goes_on(cfg) and work.exists():
        work.rename(work.with_name(f"{work.name}.before-{datetime.now(UTC):%Y%m%d-%H%M%S}"))
    work.mkdir(parents=True, exist_ok=True)
    forces = str(cfg.resume).lower() == "force"
    write_json(work / STATE_FILE, {**read_object(work / STATE_FILE), "forces": forces})
    check_inputs(
        work, {"source": source_digest("experiments/scenes", "experiments/training"), "model.world": cfg.model.world}
    )
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    free = shutil.disk_usage(work).free
    if free + there < NEEDED_BYTES:
        raise ErtaError(
            f"{work} has {free / 1e6:.0f} MB free, and training takes {NEEDED_BYTES / 1e6:.0f}: name another place in "
            "train_tiny.work_dir"
        )


def log_curves(tracker: tracking.Tracker, work: Path, told: dict[Path, int]) -> None:
    """Tell W&B what every part's curve has gained; `told` counts the lines that it knows."""
    for path in sorted(work.glob("**/curve.jsonl")):
        lines = read_lines(path)
        for line in lines[told.get(path, 0) :]:
            tracker.log(line, str(path.parent.relative_to(work)))
        told[path] = len(lines)


def install(cfg: DictConfig, pipe: Any, curves: dict[str, Path]) -> None:
    """Write the pipeline folder into the package, with the training curves and the default run's calibration."""
    target = ASSETS / cfg.model.name
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    for path in partial.glob("*/config.json"):  # diffusers notes where the parts were loaded from
        kept = {key: value for key, value in read_json(path).items() if key != "_name_or_path"}
        write_json(path, kept)
    (partial / "training").mkdir()
    for part, curve in curves.items():
        shutil.copyfile(curve, partial / "training" / f"{part}.jsonl")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    steps = cfg.model.num_inference_steps
    make_calibration(Setup(cfg), target / f"calibration-{steps}.safetensors")
    console.note(f"installed: {target}")
    if cfg.model.world != "plain":
        console.note(f"these weights know the {cfg.model.world} world: say so in conf/model/{cfg.model.name}.yaml")


def draw_sheet(pipe: Any, prompts: list[Prompt], kwargs: dict[str, Any], path: Path) -> int:
    """First, middle and last frame of every prompt as one picture; returns how many show all that was asked for."""
    from PIL import Image

    strips, right = [], 0
    for prompt in prompts:
        frames = generate(pipe, prompt.text, prompt.seed, kwargs).frames
        shown = sorted({0, len(frames) // 2, len(frames) - 1})
        strips.append(np.concatenate(frames[shown], axis=1))
        right += (scene_agreement(prompt, frames) or {"all": False})["all"]
    half = (len(strips) + 1) // 2
    strips += [np.ones_like(strips[0])] * (2 * half - len(strips))
    picture = np.concatenate([np.concatenate(strips[:half]), np.concatenate(strips[half:])], axis=1)
    image = Image.fromarray(to_uint8(picture))
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)
    return right
