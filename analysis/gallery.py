"""Everything that finished runs show, one after the other: a folder of records as headings, figures and verdicts, for notebooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import decomposition, figures, paper, plots, records, tables, verdicts
from analysis.comparison import Comparison
from analysis.records import DecompositionRecord, FigureRecord, RecordError, Rows, RowsRecord

HERE = Path(__file__).parent
DATA = HERE / "data"
Shown = Rows | FigureRecord | DecompositionRecord


@dataclass(frozen=True)
class Entry:
    """One run as a notebook shows it.

    Attributes:
        title: experiment and model.
        about: what the paper shows there, where it is known, and how ours was measured. Markdown.
        figures: in the order of the record.
        results: the claims that it decides, with their verdicts.
        sections: all of its rows.
    """

    title: str
    about: str
    figures: list[Figure]
    results: list[verdicts.Result] = field(default_factory=list)
    sections: list[tables.Section] = field(default_factory=list)

    @property
    def heading(self) -> str:
        """Title and `about` in Markdown."""
        return f"## {self.title}\n\n{self.about}"

    @property
    def verdicts(self) -> str:
        """The claims as a table in Markdown; nothing if it decides none."""
        lines = [one.cells()[:-1] for one in self.results]
        return tables.markdown(verdicts.HEADINGS[:-1], lines) if lines else ""

    @property
    def rows(self) -> str:
        """All rows as HTML, folded; nothing if there are none. (Markdown in a folded part is not read everywhere.)"""
        parts = "".join(_section(one) for one in self.sections)
        return f"<details><summary>All rows</summary>{parts}</details>" if parts else ""


def of_folder(path: str | Path = DATA) -> Iterator[Entry]:
    """Tables, figures of the paper and decompositions, in the order of their names (see `read_all`)."""
    for where, made in read_all(path).items():
        yield entry(made, where)


def read_all(path: str | Path = DATA) -> dict[Path, Shown]:
    """What lies in a folder of `*.json.gz`, in a run folder, or in the run folders below a folder, by its place.

    A relative path that does not exist here is looked for in the project's folder: notebooks run in their own. Records of
    other kinds are passed over; a damaged one is named on stderr and passed over too.

    Raises RecordError if there is no such folder, or nothing in it that can be shown.
    """
    root = _existing(Path(path).expanduser())
    files = sorted(root.glob("*.json.gz")) or sorted(file.parent for file in root.glob(f"**/{records.RECORD}"))
    found = {}
    for file in files:
        try:
            made = _read(file)
        except RecordError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if made is not None:
            found[file] = made
    if not found:
        raise RecordError(
            f"{root} holds no finished table, figure or decomposition: give a run folder, or one above it"
        )
    return found


def decompositions(path: str | Path = DATA) -> dict[str, DecompositionRecord]:
    """The decompositions among `read_all`, by file or folder. Raises RecordError if there is none."""
    every = {where.name.removesuffix(".json.gz"): made for where, made in read_all(path).items()}
    found = {name: made for name, made in every.items() if isinstance(made, DecompositionRecord)}
    if not found:
        raise RecordError(f"{path} holds no decomposition: python run.py experiment=decomposition makes one")
    return found


def entry(made: Shown, where: Path) -> Entry:
    """A run as it is shown; `where` is its folder, in which its samples are looked for."""
    if isinstance(made, DecompositionRecord):
        by_step = {part: np.array(shares) for part, shares in made.by_step.items()}
        drawn = [plots.decomposition_figure(by_step, made.growth)] if by_step else []
        lines = tables.Section("shares and growth", ["part", ""], decomposition.lines(made), [], [], [])
        return Entry(title(made), _about(made), drawn, sections=[lines])
    if isinstance(made, FigureRecord):
        drawn = [figures.OF_FIGURES[made.experiment](made.series)]
        return Entry(title(made), _about(made), drawn, verdicts.results(made))
    drawn = [figure for name in made.record.table.figures for _, figure in figures.OF_ROWS[name](made, where)]
    comparison = Comparison(made)
    return Entry(title(made), _about(made.record), drawn, comparison.results(), tables.sections(comparison))


def title(made: Shown) -> str:
    """What the paper calls it, or else the experiment; the model, and on how many prompts."""
    record = made.record if isinstance(made, Rows) else made
    name = record.kind if isinstance(record, DecompositionRecord) else record.experiment
    return f"{paper.title(name)}: {record.config['model']['name']}, {_prompts(record)}"


def _about(record: RowsRecord | FigureRecord | DecompositionRecord) -> str:
    shown = paper.data()["figures"].get(getattr(record, "experiment", ""))
    ours = f"`{record.command}`, {record.device}."
    return f"In the paper: {shown}.\n\nHere: {ours}" if shown else ours


def _prompts(record: RowsRecord | FigureRecord | DecompositionRecord) -> str:
    count = len(record.prompts) // (record.noises if isinstance(record, RowsRecord) else 1)
    return f"{count} prompt{'s' if count != 1 else ''}"


def _section(section: tables.Section) -> str:
    with pd.option_context("display.max_colwidth", None):
        table = pd.DataFrame(section.lines, columns=section.headings).to_html(index=False, border=0)
    not_run = "".join(f"<p>Not run: {escape(name)} ({escape(reason)}).</p>" for name, reason in section.not_run)
    return f"<p><b>{escape(section.title)}</b></p>{table}{not_run}"


def _read(file: Path) -> Shown | None:
    """A record with all that belongs to it; None if it is of a kind that is not shown."""
    made = records.read_kept(file)
    return made if isinstance(made, Rows | FigureRecord | DecompositionRecord) else None


def _existing(path: Path) -> Path:
    """The folder, here or in the project's. Raises RecordError if it is in neither."""
    for place in (path, HERE.parent / path):
        if place.is_dir():
            return place
    raise RecordError(f"{path} is not a folder: give a run folder, or one above it")
