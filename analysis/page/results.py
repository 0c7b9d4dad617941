"""What the results page shows, gathered from kept rows and run folders: nothing is sampled."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from analysis import figures, paper, records, tables, verdicts
from analysis.comparison import Comparison, Outcome
from analysis.page import charts, film, render
from analysis.page.charts import Chart
from analysis.page.film import Gallery
from analysis.records import ORACLE, DecompositionRecord, FigureRecord, MainRecord, RecordError, Rows
from analysis.verdicts import Result

ANALYSIS = Path(__file__).parents[1]
DATA = ANALYSIS / "data"
CLIPS = "clips"  # a folder of `DATA`, with a run folder a model
SHOWN_PAIRS = 8  # of a run
DEFAULT_MODEL = "wan21_tiny"  # comes first
FIGURES = {"decomposition": "UniPC, the pipeline's own solver", "decomposition_euler": "Euler"}


@dataclass(frozen=True)
class MethodTable:
    """A table of methods: a chart, its sections by budget, and the claims that its rows decide.

    `glance` holds a name, a value and a note each: the reference at the largest budget, and what is best there.
    """

    title: str
    command: str
    prompts: int
    model: str
    reference: str
    chart: Chart | None
    sections: list[tables.Section]
    results: list[Result]
    glance: list[tuple[str, str, str]]


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper: its picture, and what was measured about its claims."""

    title: str
    command: str
    picture: str
    results: list[Result]


@dataclass(frozen=True)
class Run:
    """A run of `experiment=main`: its pairs of clips and its steps."""

    title: str
    model: str
    command: str
    gallery: Gallery
    steps: Chart


@dataclass(frozen=True)
class Split:
    """A decomposition of the error."""

    title: str
    command: str
    charts: list[Chart]


@dataclass
class Found:
    """All that a page can show, and what was passed over, each with a line that says why."""

    tables: list[MethodTable] = field(default_factory=list)
    figures: list[PaperFigure] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def claims(self) -> list[MethodTable | PaperFigure]:
        """Tables and figures that decide something, by title."""
        both: list[MethodTable | PaperFigure] = [*self.tables, *self.figures]
        return sorted([one for one in both if one.results], key=lambda one: one.title)

    @property
    def glances(self) -> list[MethodTable]:
        """Of every model the table with the most prompts."""
        best: dict[str, MethodTable] = {}
        for table in self.tables:
            if table.glance and (table.model not in best or table.prompts > best[table.model].prompts):
                best[table.model] = table
        return list(best.values())


def kept(data: Path = DATA) -> list[Path]:
    """The files and folders that are committed with the repository."""
    clips = [path for path in sorted((data / CLIPS).glob("*")) if path.is_dir()]
    return [*sorted(data.glob("*.json.gz")), *clips]


def gather(paths: Sequence[Path]) -> Found:
    """Read files of `analysis/data`, run folders, and folders of run folders. What cannot be read is a problem.

    Tables with many prompts come before those with few, and the default model before others.
    """
    found = Found()
    for path in paths:
        nested = sorted(file.parent for file in path.glob("**/record.json")) if path.is_dir() else []
        for one in nested or [path]:
            try:
                _read(one, found)
            except RecordError as error:
                found.problems.append(str(error))
    found.tables.sort(key=lambda table: (-table.prompts, table.model != DEFAULT_MODEL))
    found.runs.sort(key=lambda run: run.model != DEFAULT_MODEL)
    return found


def _read(path: Path, found: Found) -> None:
    record = records.read_kept(path)
    if isinstance(record, Rows):
        found.tables.append(_table(record))
    elif isinstance(record, FigureRecord):
        found.figures.append(_figure(record))
    elif isinstance(record, MainRecord):
        found.runs.append(_run(path, record))
    elif isinstance(record, DecompositionRecord):
        title = f"{_title(record.config)}, {len(record.prompts)} prompts"
        found.splits.append(Split(title, record.command, charts.decomposition(record)))
    else:
        raise RecordError(f"{path} holds a record of the kind {record.kind!r}, which this page does not show")


def _title(config: dict[str, Any]) -> str:
    cache = config["cache"]
    return f"{config['model']['name']} · {cache.get('about', {}).get('title') or cache['name']}"


def _table(rows: Rows) -> MethodTable:
    comparison, record = Comparison(rows), rows.record
    points = figures.points(comparison)
    prompts, model = len(record.prompts) // record.noises, record.config["model"]["name"]
    return MethodTable(
        title=f"{paper.title(record.experiment)}: {model}, {prompts} held-out prompts",
        command=record.command,
        prompts=prompts,
        model=model,
        reference=comparison.reference_title,
        chart=charts.pareto(points) if any(point.speedup is not None for point in points) else None,
        sections=[_without_empty_columns(section) for section in tables.sections(comparison)],
        results=comparison.results(),
        glance=_glance(comparison),
    )


def _glance(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The reference at the largest budget, with what is best there."""
    group = next(iter(comparison.groups), None)
    reference = None if group is None else comparison.reference(group)
    if group is None or reference is None or not comparison.record.table.best_first:
        return []
    title, steps = comparison.reference_title, f"{group[1]} of {comparison.record.num_steps} steps"
    interval, scene, uncached = reference.interval("psnr_db"), reference.mean("scene"), comparison.uncached_scene()
    shown = [(title, _psnr(reference), f"PSNR {tables.interval_text(interval, '.1f')}, {steps}" if interval else steps)]
    if reference.speedup is not None:
        shown.append(("speed-up", f"{reference.speedup:.2f}×", "of denoising, median of timed pairs"))
    if scene is not None:
        shown.append(("scene right", f"{scene:.0%}", "" if uncached is None else f"{uncached:.0%} without a cache"))
    rivals = (one for one in comparison.of(group) if one.row.group != ORACLE)
    others = [one for one in rivals if one.samples and one is not reference]
    if others:
        gain = others[0].gain("psnr_db", reference)
        note = "" if gain is None else f"{tables.interval_text(gain, '+.1f')} dB against {title}"
        shown.append((f"best other: {others[0].row.title}", _psnr(others[0]), note))
    return shown


def _psnr(outcome: Outcome) -> str:
    psnr_db = outcome.mean("psnr_db")
    return "identical" if psnr_db is None else f"{psnr_db:.1f} dB"


def _without_empty_columns(section: tables.Section) -> tables.Section:
    headings, lines = tables.without_empty_columns(section.headings, section.lines)
    paired, differences = tables.without_empty_columns(["method", *section.paired], section.differences)
    return replace(section, headings=headings, lines=lines, differences=[paired, *differences], paired=paired[1:])


def _figure(record: FigureRecord) -> PaperFigure:
    drawn = io.BytesIO()
    figures.OF_FIGURES[record.experiment](record.series).savefig(drawn, format="png")
    title = (
        f"{paper.title(record.experiment)}: {record.config['model']['name']}, {len(record.prompts)} held-out prompts"
    )
    return PaperFigure(title, record.command, film.data_uri(drawn.getvalue(), "png"), verdicts.results(record))


def _run(folder: Path, record: MainRecord) -> Run:
    rows = read_lines(folder)
    try:
        gallery = film.gallery(folder, rows, SHOWN_PAIRS)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{folder}: the clips cannot be shown: {error}") from error
    title = f"{_title(record.config)}, {record.steps.computed:.4g} of {record.steps.uncached} steps"
    return Run(
        title,
        record.config["model"]["name"],
        record.command,
        gallery,
        charts.step_map(record.steps.mask, record.sigmas),
    )


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `per_prompt.jsonl`. Raises RecordError if there are none, or one is damaged."""
    path = folder / records.PER_PROMPT
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise RecordError(f"{path} holds no prompts")
    return rows


def write(found: Found, out: Path) -> None:
    """The page. Raises RecordError if there is nothing to show, or the file cannot be written."""
    if not (found.tables or found.figures or found.runs or found.splits):
        raise RecordError("nothing to show: name run folders of finished runs")
    pictures = {} if found.splits else _committed_figures()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        render.write("results.html.j2", out, found=found, pictures=pictures, plotly=get_plotlyjs())
    except OSError as error:
        raise RecordError(f"cannot write {out}: {error.strerror}") from error


def _committed_figures() -> dict[str, str]:
    """Pictures of the decomposition in `analysis/figures`, by caption: shown where no run folder has its numbers."""
    found = {text: ANALYSIS / "figures" / f"{name}.png" for name, text in FIGURES.items()}
    return {text: film.data_uri(path.read_bytes(), "png") for text, path in found.items() if path.is_file()}
