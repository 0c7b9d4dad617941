"""The one engine of rows: samples every row of a table, in several processes if there are cores for it.

What is finished lies in the run folder (see `analysis.records`), so the same command goes on from there. A row that refuses
is left out with the reason, whatever goes wrong in the pipeline is a failure, and the other rows go on. Every row is compared
with the same uncached samples, paired by prompt and noise; forwards are counted, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from analysis import records, tables
from analysis.comparison import Comparison
from analysis.figures import SAMPLES, slug
from erta.errors import ErtaError
from experiments.bench.fidelity import Lpips, psnr_db, ssim
from experiments.bench.scene import scene_agreement
from experiments.harness.arm import Arm, make_arm
from experiments.harness.calibrations import get_calibration
from experiments.harness.config import own_keys
from experiments.harness.row_scores import RowBench, keep_sample, sample_files
from experiments.harness.rows import Row, compose_row
from experiments.harness.setup import Setup
from experiments.harness.uncached import uncached_samples
from experiments.harness.workers import Event, shared_threads, side_by_side
from experiments.harness.worst import keep_worst_of_rows
from experiments.output import console, ranks, tracking
from experiments.output.clips import frames_of, is_whole
from experiments.output.console import progress_bar
from experiments.output.files import append_line, read_lines, read_object, read_own_lines, write_json
from experiments.output.provenance import describe_inputs, describe_run, environment
from experiments.output.run_folder import check_inputs, mark_finished, write_record
from experiments.prompts.choose import Prompt

SEED_STRIDE = 100_000  # between the noises of one prompt
SET_UP, SAMPLED, LEFT, FAILED = "set up", "sampled", "is left out", "failed"  # what happens to a row
Piece = list[tuple[Row, tuple[int, ...]]]  # rows for one process, with the numbers of the samples that are missing


@dataclass(frozen=True)
class Work:
    """What every process of a table is given."""

    cfg: DictConfig
    folder: Path
    prompts: list[Prompt]  # once a noise
    timed: int
    shown: int = 0  # samples a row that are kept for a page
    pictured: frozenset[str] = frozenset()  # rows of which at least the first sample is kept for it
    lossless: bool = False  # whether all are kept for a benchmark
    ran_on: str = ""

    @property
    def workers_key(self) -> str:
        """The key that says how many processes share the rows."""
        return f"{self.cfg.experiment.name}.workers"


def run_table(
    cfg: DictConfig,
    folder: Path,
    rows: list[Row],
    table: records.Table,
    num_prompts: int | None = None,
    timed: int | None = None,
    shown: int = 0,
    worst: int = 0,
) -> None:
    """Sample every row on every prompt and noise, then write and print the table (see `analysis.tables`).

    Args:
        num_prompts: only the first so many of `bench.num_prompts`.
        timed: samples of each row that are timed in turns with uncached ones, in place of the experiment's `timed`.
        shown: samples of each row that are kept for figures.

    Raises ErtaError if the folder's samples belong to other prompts, weights or calibrations, and at the end if a row failed
    inside the pipeline; a row that refuses is no failure.
    """
    if cfg.bench.frames_from != "decoded":
        console.note(f"PSNR and SSIM compare frames read from {cfg.bench.frames_from} files, in all rows")
    bench = RowBench(cfg)
    once, noises = bench.prompts()[:num_prompts], own_keys(cfg).seeds
    if bench.keeps_all and noises > 1:
        raise ErtaError(f"bench={cfg.bench.name} scores one sample a prompt: {cfg.experiment.name}.seeds=1")
    prompts = [replace(p, seed=p.seed + SEED_STRIDE * s) for s in range(noises) for p in once]
    record = records.RowsRecord(
        **describe_run(cfg, prompts),
        experiment=cfg.experiment.name,
        num_steps=cfg.model.num_inference_steps,
        noises=noises,
        rows=[row.record() for row in rows],
        table=table,
        uncached_scene=[None] * len(prompts),
    )
    setup = Setup(cfg)
    calibration = get_calibration(setup)
    ranks.same(lambda: check_inputs(folder, describe_inputs(setup.pipe, prompts, calibration)))
    with tracking.start(cfg, folder) as tracker:
        references = [row for row in rows if row.label == table.reference][: tracking.SHOWN_PAIRS]
        pictured = frozenset([records.UNCACHED, *(row.key for row in references)])
        work = Work(
            cfg, folder, prompts, own_keys(cfg).timed if timed is None else timed, shown, pictured, bench.keeps_all
        )
        samples = _sample(setup, work, rows, record, tracker)
        bench.score(folder, [row.key for row in rows if not samples.missing(row)], prompts)
        if not ranks.is_first():
            return
        found = records.read_rows(folder)
        keep_worst_of_rows(setup, folder, [r for r in rows if r.label == table.reference], found, prompts, worst)
        written = tables.write(folder, found)
        reasons = [one.reason for one in Comparison(found).outcomes if one.reason]
        _track(tracker, folder, references, once[0].text)
        tracker.figures(folder / "figures")
        tracker.finish({"sampled": len(rows) - len(reasons), "left_out": len(reasons)})
    tables.show(found, console.table, console.note)
    console.note("\n".join(f"written: {path}" for path in written))
    mark_finished(folder)
    if samples.failed:
        raise ErtaError(f"failed inside the pipeline: {', '.join(samples.failed)}. The other rows are in {folder}")


def _sample(
    setup: Setup, work: Work, rows: list[Row], record: records.RowsRecord, tracker: tracking.Tracker
) -> Samples:
    """Every row on every prompt and noise. What the folder holds is not made again. Ranks share the rows."""
    samples = _held(work, rows)
    known = set(samples.recorded)
    for line in ranks.same(lambda: read_lines(work.folder / records.ROWS)):
        tracker.log(line, line["row"])
    for row in rows:
        if row.why_not is not None and row.key not in samples.left_out:
            samples.add(Event(LEFT, row.key, {"reason": row.why_not}))
    _calibrate(setup, rows)
    pieces = ranks.share(samples.pieces())
    with _processes(work, len(pieces)) as count:
        _keep_uncached(setup, work, record)
        with ranks.alone(), closing(_events(setup, work, pieces, count)) as events, progress_bar() as bar:
            total = len(samples.done) + sum(len(missing) for piece in pieces for _, missing in piece)
            task = bar.add_task("rows", total=total, completed=len(samples.done), visible=False)
            for event in events:
                samples.add(event)
                if event.kind == SAMPLED:
                    tracker.log(event.about, event.row)
                    known.add((event.row, event.about["index"]))
                settled = len(samples.done) + sum(
                    len(missing) for piece in pieces for row, missing in piece if row.key in samples.left_out
                )
                bar.update(task, description=event.row, completed=settled, visible=True)
    if ranks.count() == 1:
        return samples
    left_out, failed = zip(*ranks.gathered((samples.left_out, samples.failed)), strict=True)
    reasons = {key: reason for one in left_out for key, reason in one.items()}
    if ranks.is_first() and reasons:
        write_json(work.folder / records.LEFT_OUT, reasons)
    merged = _held(work, rows)
    merged.failed = [key for one in failed for key in one]
    for line in ranks.same(lambda: read_lines(work.folder / records.ROWS)):
        if (line["row"], line["index"]) not in known:  # another rank's
            tracker.log(line, line["row"])
    return merged


def _held(work: Work, rows: list[Row]) -> Samples:
    """What the folder holds, with what ranks of this command or of one before it have written."""
    for name in (records.ROWS, records.SETUPS):
        ranks.merge_lines(work.folder / name)

    def is_kept(key: str, index: int) -> bool:
        return all(map(is_whole, kept_files(work, key, index)))

    return ranks.same(lambda: Samples(work.folder, rows, len(work.prompts), is_kept))


def _track(tracker: tracking.Tracker, folder: Path, rows: list[Row], prompt: str) -> None:
    """The first sample of these rows for W&B, each next to its uncached twin."""
    for row in rows:
        sides = {key: folder / SAMPLES / slug(key) / "000.webp" for key in (records.UNCACHED, row.key)}
        tracker.media(f"{SAMPLES}/{row.key}", sides, prompt)


class Samples:
    """What a table's folder holds: samples, how their rows were set up, and why a row was left out.

    Attributes:
        recorded: samples with a line of their own; `done`: those of which everything that is kept is there too.
    """

    def __init__(
        self, folder: Path, rows: list[Row], count: int, is_kept: Callable[[str, int], bool] = lambda key, index: True
    ) -> None:
        self.folder, self.rows, self.count = folder, rows, count
        keys = {row.key for row in rows}

        def sample(line: dict[str, Any]) -> tuple[str, int] | None:
            key, index = line.get("row"), line.get("index")
            return (key, index) if key in keys and isinstance(index, int) and 0 <= index < count else None

        def row(line: dict[str, Any]) -> str | None:
            return line.get("row") if line.get("row") in keys else None

        lines = read_own_lines(folder / records.ROWS, sample)
        self.recorded = {(line["row"], line["index"]) for line in lines}
        self.done = {one for one in self.recorded if is_kept(*one)}
        self.setups = {line["row"] for line in read_own_lines(folder / records.SETUPS, row)}
        self.left_out: dict[str, str] = {k: v for k, v in read_object(folder / records.LEFT_OUT).items() if k in keys}
        self.failed: list[str] = []

    def missing(self, row: Row) -> tuple[int, ...]:
        """Numbers of the samples that the row does not have."""
        return tuple(index for index in range(self.count) if (row.key, index) not in self.done)

    def pieces(self) -> list[Piece]:
        """What is missing. Rows that use what one method searched stay together; the longest pieces come first."""
        pieces: dict[str, Piece] = {}
        for row in self.rows:
            if row.why_not is None and (missing := self.missing(row)):
                pieces.setdefault(row.searches or row.method, []).append((row, missing))
        return sorted(pieces.values(), key=lambda piece: -sum(len(missing) for _, missing in piece))

    def add(self, event: Event) -> None:
        """Note what happened to a row, in the folder too."""
        if event.kind == SAMPLED:
            one = (event.row, event.about["index"])
            if one not in self.recorded:  # else a lost sample was made anew; its line stays
                append_line(ranks.own_file(self.folder / records.ROWS), event.about)
            self.recorded.add(one)
            self.done.add(one)
        elif event.kind == SET_UP and event.row not in self.setups:
            self.setups.add(event.row)
            append_line(ranks.own_file(self.folder / records.SETUPS), event.about)
        elif event.kind in (LEFT, FAILED):
            self.left_out[event.row] = event.about["reason"]
            if ranks.is_first():
                write_json(self.folder / records.LEFT_OUT, self.left_out)
            self.failed += [event.row] if event.kind == FAILED else []
            console.note(f"{event.row} {event.kind}: {event.about['reason']}")


def _calibrate(setup: Setup, rows: list[Row]) -> None:
    """The calibrations that rows need, once and not in every process."""
    for row in {row.site: row for row in rows if row.site is not None}.values():
        with suppress(ErtaError):  # the rows of that site say it
            get_calibration(setup.with_cache(compose_row(row)))


def _keep_uncached(setup: Setup, work: Work, record: records.RowsRecord) -> None:
    """The uncached samples that all rows are compared with, and the record, which says what they show."""
    references, keep = uncached_samples(setup, work.prompts, work.folder), keeper(work)
    if not ranks.is_first():
        return
    for index, frames in enumerate(references):
        if not all(map(is_whole, kept_files(work, records.UNCACHED, index))):
            keep(records.UNCACHED, index, frames)
    scenes = [scene_agreement(p, frames) for p, frames in zip(work.prompts, references, strict=True)]
    write_record(work.folder, replace(record, uncached_scene=scenes))


def _processes(work: Work, pieces: int) -> AbstractContextManager[int]:
    """How many share the rows. Inside the `with`, this one has as many of torch's threads as each of them.

    Their number decides how sums are rounded: with another one the uncached samples would not be the rows' to the last bit.
    """
    by_default = work.cfg.model.embedded and not torch.cuda.is_available()  # a large model is in memory once
    asked = own_keys(work.cfg).workers
    if ranks.count() > 1:
        if (asked or 1) > 1:
            raise ErtaError(f"{work.workers_key}={asked}: the ranks of torchrun share the rows already; leave it out")
        asked = 1
    return shared_threads(asked, pieces, by_default, work.workers_key)


def _events(setup: Setup, work: Work, pieces: list[Piece], count: int) -> Generator[Event, None, None]:
    """What happens to these rows, in this process or in `count` others."""
    device = environment()["device"]
    ran_on = device if count == 1 else f"{count} processes side by side, each on {device}"
    if ranks.count() > 1:
        ran_on = f"{ranks.count()} ranks, each on {device}"
    work = replace(work, ran_on=ran_on)
    if count == 1:
        sample = sampler(work, setup)
        for piece in pieces:
            yield from sample(piece)
    else:
        del setup
        yield from side_by_side(count, work.workers_key, pieces, sampler, work)


def sampler(work: Work, setup: Setup | None = None) -> Callable[[Piece], Iterator[Event]]:
    """What samples a piece, on the pipeline given or on one of its own.

    A row that refuses before its first sample is left out; whatever goes wrong in the pipeline is a failure.
    """
    setup = setup if setup is not None else Setup(work.cfg)
    measure = measurer(work, setup)
    commit = environment()["git_commit"]

    def sample(piece: Piece) -> Iterator[Event]:
        for row, missing in piece:
            arm = None
            try:
                arm = make_arm(setup.with_cache(compose_row(row)))
                about = records.RowSetup(
                    row=row.key,
                    calibration_s=arm.calibration_s,
                    last_sigma=float(arm.sigmas(setup)[-2]),
                    ran_on=work.ran_on,
                    commit=commit,
                    report=arm.about,
                )
                yield Event(SET_UP, row.key, records.to_json(about))
                for index in missing:
                    yield Event(SAMPLED, row.key, records.to_json(measure(row, arm, index)))
            except Exception as error:  # another library's code may raise anything; the row says what
                refused = arm is None and isinstance(error, ErtaError)
                reason = str(error) if refused else _first_line(error)
                yield Event(LEFT if refused else FAILED, row.key, {"reason": reason})

    return sample


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def measurer(work: Work, setup: Setup) -> Callable[[Row, Arm, int], records.Sample]:
    """What measures an arm on the k-th prompt; the first few next to an uncached run, which goes first every other time.

    The process's first run, which takes longer, is not measured.
    """
    lpips, compared, pipe, prompts, keep = Lpips(), comparer(work.cfg), setup.pipe, work.prompts, keeper(work)
    references, uncached = uncached_samples(setup, prompts, work.folder), Arm(None, setup.kwargs)
    if prompts:
        Arm(None, {**setup.kwargs, "num_inference_steps": 2}).sample(pipe, prompts[0])

    def measure(row: Row, arm: Arm, index: int) -> records.Sample:
        prompt = prompts[index]
        made, uncached_s = None, None
        if index < work.timed and index % 2:
            made = arm.sample(pipe, prompt)
        if index < work.timed:
            uncached_s = uncached.sample(pipe, prompt).denoise_s
        made = made or arm.sample(pipe, prompt)
        keep(row.key, index, made.frames)
        pair = compared(made.frames, references[index])
        return records.Sample(
            row=row.key,
            index=index,
            forwards=made.forwards,
            denoise_s=made.denoise_s,
            uncached_s=uncached_s,
            psnr_db=psnr_db(*pair),
            ssim=ssim(*pair),
            lpips=None if lpips.missing else lpips(*pair),
            scene=scene_agreement(prompt, made.frames),
            cache_bytes=made.cache_bytes,
        )

    return measure


def keeper(work: Work) -> Callable[[str, int, np.ndarray], None]:
    """What keeps the k-th sample of a row, named by its key, as figures and the benchmark need it."""

    def keep(key: str, index: int, frames: np.ndarray) -> None:
        keep_sample(work.cfg, kept_files(work, key, index), frames)

    return keep


def kept_files(work: Work, key: str, index: int) -> list[Path]:
    """The files that are kept of the k-th sample of a row; none, where nobody looks at them."""
    shown = max(work.shown, int(key in work.pictured))
    return sample_files(work.cfg, work.folder, key, work.prompts[index], index, shown, work.lossless)


def comparer(cfg: DictConfig) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    """What gives the frames of a sample and of its reference as `bench.frames_from` wants them compared."""

    def compared(sample: np.ndarray, reference: np.ndarray) -> list[np.ndarray]:
        with TemporaryDirectory() as folder:
            return [
                frames_of(cfg.bench.frames_from, each, Path(folder, "compared.mp4")) for each in (sample, reference)
            ]

    return compared if cfg.bench.frames_from != "decoded" else lambda sample, reference: [sample, reference]
