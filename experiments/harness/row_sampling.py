"""The samples of a comparison: made row by row, in several processes if there are cores for it, and kept in its folder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.bench.fidelity import Lpips, psnr_db, ssim
from experiments.bench.scene import scene_agreement
from experiments.harness.arm import Arm
from experiments.harness.comparison import REFERENCE, Outcome
from experiments.harness.generate import generate
from experiments.harness.rows import Row, RowArms, comparer, uncached_clips, uncached_path
from experiments.harness.workers import Event, shared_threads, side_by_side
from experiments.models.call import call_kwargs
from experiments.models.load import load_pipeline
from experiments.output import console
from experiments.output.console import progress_bar
from experiments.output.run_folder import (
    append_line,
    check_inputs,
    describe_inputs,
    environment,
    read_json,
    read_lines,
    write_json,
)
from experiments.prompts.choose import Prompt

TIMED, QUICK_TIMED = 6, 4  # prompts of each row on which an uncached run is timed too, right before or after
ROWS, ARMS, LEFT_OUT = "rows.jsonl", "arms.jsonl", "left_out.json"
SET_UP, SAMPLED, LEFT, FAILED = "set up", "sampled", "is left out", "failed"  # what happens to a row
Piece = list[tuple[Row, tuple[int, ...]]]  # rows for one process, with the numbers of the prompts that are missing


class Samples:
    """What a comparison's folder holds: samples, how their arms were set up, and why a row was left out."""

    def __init__(self, folder: Path, rows: list[Row], num_prompts: int) -> None:
        self.folder, self.rows, self.num_prompts = folder, rows, num_prompts
        self.done = {(line["row"], line["index"]): line for line in read_lines(folder / ROWS)}
        self.arms = {line["row"]: line for line in read_lines(folder / ARMS)}
        self.left_out: dict[str, str] = read_json(folder / LEFT_OUT) or {}
        self.failed: list[str] = []

    def missing(self, row: Row) -> tuple[int, ...]:
        """Numbers of the prompts that the row has no sample of."""
        return tuple(index for index in range(self.num_prompts) if (row.key, index) not in self.done)

    def pieces(self) -> list[Piece]:
        """What is missing. Rows that use what one method searched stay together; the longest pieces come first."""
        pieces: dict[str, Piece] = {}
        for row in self.rows:
            if missing := self.missing(row):
                method = row.label.removeprefix("plan_grid of ")
                pieces.setdefault(REFERENCE if method == "plan_grid" else method, []).append((row, missing))
        return sorted(pieces.values(), key=lambda piece: -sum(len(missing) for _, missing in piece))

    def add(self, event: Event) -> None:
        """Note what happened to a row, in the folder too."""
        if event.kind == SAMPLED:
            self.done[event.row, event.about["index"]] = event.about
            append_line(self.folder / ROWS, event.about)
        elif event.kind == SET_UP and event.row not in self.arms:
            self.arms[event.row] = event.about
            append_line(self.folder / ARMS, event.about)
        elif event.kind in (LEFT, FAILED):
            self.left_out[event.row] = event.about["reason"]
            write_json(self.folder / LEFT_OUT, self.left_out)
            self.failed += [event.row] if event.kind == FAILED else []
            console.note(f"{event.row} {event.kind}: {event.about['reason']}")

    def outcome(self, row: Row) -> Outcome:
        """The row's samples, or why it has none."""
        if missing := self.missing(row):
            unfinished = f"not finished: {self.num_prompts - len(missing)} of {self.num_prompts} prompts"
            return Outcome(row, reason=self.left_out.get(row.key, unfinished))
        arm = self.arms[row.key]
        samples = [self.done[row.key, index] for index in range(self.num_prompts)]
        return Outcome(row, samples, arm["calibration_s"], ran_on=arm.get("ran_on"), commit=arm.get("commit"))


def sample_all(
    cfg: DictConfig, folder: Path, rows: list[Row], prompts: list[Prompt]
) -> tuple[list[Outcome], list[str]]:
    """Every row on every prompt, and the rows that failed. What `rows.jsonl` holds already is not made again.

    With `compare.only_finished` nothing is made: rows that are not whole say so, or why they were left out before.
    """
    samples = Samples(folder, rows, len(prompts))
    if cfg.compare.only_finished:
        outcomes = [samples.outcome(row) for row in rows]
        for outcome in outcomes:
            if outcome.reason:
                console.note(f"{outcome.row.key} {LEFT}: {outcome.reason}")
        return outcomes, []
    with closing(events_of(cfg, folder, prompts, samples.pieces())) as events, progress_bar() as bar:
        task = bar.add_task("rows", total=len(rows) * len(prompts), completed=len(samples.done), visible=False)
        for event in events:
            samples.add(event)
            settled = len(samples.done) + sum(len(samples.missing(row)) for row in rows if row.key in samples.left_out)
            bar.update(task, description=event.row, completed=settled, visible=True)
    return [samples.outcome(row) for row in rows], samples.failed


def uncached_scene(folder: Path, prompts: list[Prompt]) -> float | None:
    """Share of the uncached samples that show all that was asked for; None if one is missing or cannot be checked."""
    paths = [uncached_path(folder, index) for index in range(len(prompts))]
    if not all(path.is_file() for path in paths):
        return None
    found = [scene_agreement(prompt, np.load(path)) for prompt, path in zip(prompts, paths, strict=True)]
    right = [scene["all"] for scene in found if scene is not None]
    return float(np.mean(right)) if len(right) == len(prompts) else None


def events_of(
    cfg: DictConfig, folder: Path, prompts: list[Prompt], pieces: list[Piece]
) -> Generator[Event, None, None]:
    """What happens to the rows of all pieces, after the uncached samples that they are compared with were made.

    Raises ErtaError if the folder's samples belong to other prompts, weights or calibrations.
    """
    pipe = load_pipeline(cfg)
    check_inputs(folder, describe_inputs(pipe, prompts, RowArms(pipe).calibration(cfg)))
    by_default = cfg.model.embedded and not torch.cuda.is_available()  # a large model is in memory once
    with shared_threads(cfg.compare.workers, len(pieces), by_default) as count:
        uncached_clips(pipe, cfg, prompts, folder)
        device = environment()["device"]
        given = cfg, folder, prompts, device if count == 1 else f"{count} processes side by side, each on {device}"
        if count == 1:
            sample = sampler(*given, pipe)
            for piece in pieces:
                yield from sample(piece)
        else:
            del pipe
            yield from side_by_side(count, pieces, sampler, *given)


def sampler(
    cfg: DictConfig, folder: Path, prompts: list[Prompt], ran_on: str, pipe: Any = None
) -> Callable[[Piece], Iterator[Event]]:
    """What samples a piece, on the pipeline given or on one of its own.

    An arm that refuses before its first sample is left out; whatever goes wrong in the pipeline is a failure.
    """
    pipe = pipe if pipe is not None else load_pipeline(cfg)
    arms, measure = RowArms(pipe), measurer(cfg, folder, pipe, prompts)
    commit = environment()["git_commit"]

    def sample(piece: Piece) -> Iterator[Event]:
        for row, missing in piece:
            arm = None
            try:
                arm = arms.build(row)
                about = {"calibration_s": arm.calibration_s, "ran_on": ran_on, "commit": commit, "report": arm.report}
                yield Event(SET_UP, row.key, {"row": row.key, **about})
                for index in missing:
                    yield Event(SAMPLED, row.key, {"row": row.key, **measure(arm, index)})
            except Exception as error:  # a peer's code may raise anything; the row says what
                refused = arm is None and isinstance(error, ErtaError)
                reason = str(error) if refused else _first_line(error)
                yield Event(LEFT if refused else FAILED, row.key, {"reason": reason})

    return sample


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def measurer(cfg: DictConfig, folder: Path, pipe: Any, prompts: list[Prompt]) -> Callable[[Arm, int], dict[str, Any]]:
    """What measures an arm on the k-th prompt; the first few next to an uncached run, which goes first every other time.

    The process's first run, which takes longer, is not measured.
    """
    lpips, base, compared = Lpips(), call_kwargs(cfg), comparer(cfg)
    references = uncached_clips(pipe, cfg, prompts, folder)
    if prompts:
        generate(pipe, prompts[0].text, 0, {**base, "num_inference_steps": 2})
    timed = QUICK_TIMED if cfg.compare.quick else TIMED

    def measure(arm: Arm, index: int) -> dict[str, Any]:
        prompt = prompts[index]
        made, uncached_s = None, None
        if index < timed and index % 2:
            made = generate(pipe, prompt.text, prompt.seed, arm.kwargs, arm.put_on)
        if index < timed:
            uncached_s = generate(pipe, prompt.text, prompt.seed, base).denoise_s
        made = made or generate(pipe, prompt.text, prompt.seed, arm.kwargs, arm.put_on)
        scene, pair = scene_agreement(prompt, made.frames), compared(made.frames, references[index])
        return {
            "index": index,
            "forwards": made.forwards,
            "denoise_s": made.denoise_s,
            "uncached_s": uncached_s,
            "psnr_db": psnr_db(*pair),
            "ssim": ssim(*pair),
            "lpips": None if lpips.missing else lpips(*pair),
            "scene": None if scene is None else scene["all"],
            "cache_bytes": made.cache_bytes,
        }

    return measure
