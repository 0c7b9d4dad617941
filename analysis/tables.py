"""Tables and figures of finished runs: `python -m analysis.tables FOLDER…`. Nothing is sampled, and no torch is needed.

In a run folder of a table (finished or not) or of a figure, `table.md` and the figures are made; of a file of
`analysis/data` the table is printed. With `--keep NAME` the rows are kept as `analysis/data/NAME.json.gz`, the table as
`analysis/tables/NAME.md` and the figures beside.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import figures, paper, records, verdicts
from analysis.comparison import FLIPPED_DB, FORMS, METRICS, Comparison, Outcome
from analysis.intervals import Interval

HERE = Path(__file__).parent
TABLE = "table.md"


@dataclass(frozen=True)
class Column:
    """A column: its heading, the cell of a row, and that of the uncached run."""

    heading: str
    cell: Callable[[Outcome, Outcome | None, Comparison], str]
    uncached: Callable[[Comparison], str] = lambda comparison: ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def interval_text(interval: Interval | None, form: str) -> str:
    """An interval as `mean [low, high]`; nothing if there is none."""
    return "" if interval is None else f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _forwards(outcome: Outcome, *_: Any) -> str:
    counts = sorted({round(sample.forwards, 1) for sample in outcome.samples})
    return "/".join(f"{count:g}" for count in counts) if len(counts) <= 2 else f"{outcome.forwards:.1f}"


def _psnr(outcome: Outcome, *_: Any) -> str:
    return _number(outcome.mean("psnr_db"), ".2f") or "identical"


def _psnr_std(outcome: Outcome, *_: Any) -> str:
    known = outcome.known("psnr_db")
    return f"{np.mean(known):.2f} ± {np.std(known):.2f}" if known else "identical"


def _gain(outcome: Outcome, reference: Outcome | None, comparison: Comparison) -> str:
    if reference is None or outcome is reference:
        return ""
    return interval_text(outcome.gain("psnr_db", reference), "+.2f")


def _scene(outcome: Outcome, *_: Any) -> str:
    return _number(outcome.mean("scene"), ".1%")


def _speedup(outcome: Outcome, *_: Any) -> str:
    return "" if outcome.speedup is None else f"{outcome.speedup:.2f}x"


def _printed(heading: str, metric: str, form: str, uncached: str = "") -> Column:
    """A column of the paper's numbers, of the paper's models: beside ours, never among them."""
    return Column(f"paper: {heading}", lambda o, *_: _number(o.row.paper.get(metric), form), lambda c: uncached)


def _scored(heading: str, metric: str, form: str) -> Column:
    """A column of a benchmark's score of all samples of a row, or its mean over them."""

    def value(scores: records.RowScores | None) -> str:
        if scores is None:
            return ""
        known = [one for one in scores.by_sample.get(metric, ()) if one is not None]
        return _number(scores.whole.get(metric, float(np.mean(known)) if known else None), form)

    return Column(heading, lambda o, *_: value(o.scores), lambda c: value(c.uncached_scores))


COLUMNS = {
    "forwards": Column("forwards", _forwards, lambda c: _number(c.full_forwards, "g")),
    "speedup": Column("speed-up, measured", _speedup, lambda c: "1.00x"),
    "psnr_db": Column("PSNR dB", _psnr, lambda c: "reference"),
    "psnr_db_std": Column("PSNR dB, ± std", _psnr_std, lambda c: "reference"),
    "psnr_median": Column("median", lambda o, *_: _number(o.psnr_median, ".1f")),
    "psnr_worst": Column("worst", lambda o, *_: _number(o.psnr_worst, ".1f")),
    "flips": Column("flips", lambda o, *_: f"{o.flips:.0%}"),
    "gain": Column("against {reference} (95 %)", _gain),
    "ssim": Column("SSIM", lambda o, *_: f"{o.mean('ssim'):.4f}"),
    "lpips": Column("LPIPS", lambda o, *_: _number(o.mean("lpips"), ".4f")),
    "scene": Column("scene, all", _scene, lambda c: _number(c.uncached_scene(), ".1%")),
    "scene_change": Column("against uncached (95 %)", lambda o, r, c: interval_text(c.scene_change(o), "+.1%")),
    "last_sigma": Column("last sigma step", lambda o, *_: _number(o.setup.last_sigma if o.setup else None, ".3f")),
    "cache_bytes": Column("cache bytes", lambda o, *_: f"{max(s.cache_bytes for s in o.samples):,}", lambda c: "0"),
    "calibration_s": Column(
        "calibration s", lambda o, *_: _number(o.setup.calibration_s if o.setup else None, ".0f"), lambda c: "0"
    ),
    "vbench": _scored("VBench, total", "vbench_total", ".4f"),
    "vbench_mean": _scored("VBench, mean of what was evaluated", "vbench_mean", ".4f"),
    "clip_score": _scored("CLIP score", "clip_score", ".2f"),
    "fid": _scored("FID", "fid", ".4f"),
    "paper_speedup": _printed("speed-up", "speedup", ".2f", "1.00"),
    "paper_psnr_db": _printed("PSNR dB", "psnr_db", ".2f"),
    "paper_ssim": _printed("SSIM", "ssim", ".4f"),
    "paper_lpips": _printed("LPIPS", "lpips", ".4f"),
    "paper_vbench": _printed("VBench %", "vbench", ".2f"),
    "paper_clip_score": _printed("CLIP", "clip_score", ".4f"),
}


SPREAD = ("psnr_median", "psnr_worst", "flips")  # follow every mean of PSNR: two populations hide in it


@dataclass(frozen=True)
class Section:
    """The rows of one place: lines of cells, their paired differences, and what was not sampled and why."""

    title: str
    headings: list[str]
    lines: list[list[str]]
    differences: list[list[str]]
    paired: list[str]  # headings of the differences
    not_run: list[tuple[str, str]]


def sections(comparison: Comparison) -> list[Section]:
    """A section for each site and budget, below the uncached run and the rows without a budget (the noise floor)."""
    table, made = comparison.record.table, []
    columns = [
        COLUMNS[name]
        for given in table.columns
        for name in (given, *(SPREAD if given in ("psnr_db", "psnr_db_std") else ()))
    ]
    headings = ["method", *(column.heading.format(reference=comparison.reference_title) for column in columns)]
    full = comparison.full_forwards
    metrics = [metric for metric in FORMS if metric in METRICS or any(o.known(metric) for o in comparison.outcomes)]
    known = full is not None or comparison.uncached_scene() is not None  # something of the uncached samples
    for group in comparison.groups:
        here, reference = comparison.of(group), comparison.reference(group)
        shown = [one for one in (*comparison.without_budget(), *here) if one.samples]
        lines = [["uncached", *(column.uncached(comparison) for column in columns)]] if known else []
        for one in shown:
            if one.reused_nothing(full):
                lines.append([one.row.title, "did not reuse anything", *[""] * (len(columns) - 1)])
            else:
                lines.append([one.row.title, *(column.cell(one, reference, comparison) for column in columns)])
        missing = [one for one in (*comparison.without_budget(), *here) if one.reason]
        made.append(
            Section(
                title=comparison.title(group),
                headings=headings,
                lines=lines,
                differences=differences(here, reference, full, metrics),
                paired=[FORMS[metric][0] for metric in metrics],
                not_run=[(one.row.title, one.reason or "") for one in missing],
            )
        )
    return made


def differences(
    here: list[Outcome], reference: Outcome | None, full: float | None, metrics: list[str]
) -> list[list[str]]:
    """All paired differences of a group to its reference, in the order of the table."""
    if reference is None:
        return []
    others = [o for o in here if o.samples and o is not reference and not o.reused_nothing(full)]
    return [
        [o.row.title, *(interval_text(o.gain(metric, reference), FORMS[metric][1]) for metric in metrics)]
        for o in others
    ]


def without_empty_columns(headings: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which some line has something, the first in any case: without its weights nobody has LPIPS."""
    full = [k for k in range(len(headings)) if k == 0 or any(line[k] for line in lines)]
    return [headings[k] for k in full], [[line[k] for k in full] for line in lines]


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    text = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in lines)])


def as_markdown(rows: records.Rows) -> str:
    """All of a table: a section for each site and budget, verdicts, the paper's numbers, and where it was sampled."""
    comparison, record = Comparison(rows), rows.record
    reference = comparison.reference_title
    setups = list(rows.setups.values())
    where = "; ".join(sorted({one.ran_on for one in setups})) or record.device
    commits = ", ".join(sorted({one.commit for one in setups if one.commit})) or str(record.git_commit)
    noises = f", {record.noises} noises each" if record.noises > 1 else ""
    about = f"{record.config['model']['name']}, {len(record.prompts) // record.noises} held-out prompts{noises}"
    text = [
        f"# {about}",
        f"`{record.command}`; sampled at commit {commits}, {where}.",
        "Forwards are counted, in equivalents of whole ones. Speed-ups are medians over pairs timed in turns, one sample "
        f"after the other. A flip is a sample below {FLIPPED_DB:g} dB, or one whose scene is read otherwise than the uncached "
        f"sample's. Differences are paired by prompt and noise, row minus {reference}, with their 95 % intervals; that of the "
        "speed-up is the mean over the timed pairs.",
    ]
    for section in sections(comparison):
        text += [f"## {section.title}", markdown(section.headings, section.lines)]
        if section.differences:
            text += [f"Against {reference}:", markdown(["method", *section.paired], section.differences)]
        if section.not_run:
            text += ["Not run:", "\n".join(f"- {title}: {reason}" for title, reason in section.not_run)]
    if said := comparison.results():
        text += ["## Verdicts", markdown(verdicts.HEADINGS, [one.cells() for one in said])]
    if record.table.source:
        text += [f"Columns named *paper* are of the paper's models, printed in {record.table.source}."]
    return "\n\n".join(text) + "\n"


def show_results(
    said: list[verdicts.Result],
    command: str,
    table: Callable[[str, list[str], list[list[str]]], None],
    note: Callable[[str], None],
) -> None:
    """Claims with their verdicts on the terminal, as in `show`."""
    if said:
        table("paper · ours · verdict", verdicts.HEADINGS[:-1], [one.cells()[:-1] for one in said])
        note(f"measured by: {command}")


def show(
    rows: records.Rows, table: Callable[[str, list[str], list[list[str]]], None], note: Callable[[str], None]
) -> None:
    """A table on the terminal: `table` is given a title, headings and lines, `note` a line of text."""
    comparison = Comparison(rows)
    for section in sections(comparison):
        missing = [[title, "not run", *[""] * (len(section.headings) - 2)] for title, _ in section.not_run]
        prompts = len(rows.record.prompts) // rows.record.noises
        name = rows.record.config["model"]["name"]
        table(f"{name}, {prompts} held-out prompts, {section.title}", section.headings, [*section.lines, *missing])
    show_results(comparison.results(), rows.record.command, table, note)


def write(folder: Path, rows: records.Rows) -> list[Path]:
    """`table.md` in `folder`, and the table's figures; the files that were written."""
    path = folder / TABLE
    path.write_bytes(as_text(rows))
    return [path, *figures.of_rows(rows, folder)]


def figure_as_markdown(record: records.FigureRecord) -> str:
    """What a figure says of its claims, and where it was measured."""
    about = (
        f"{paper.title(record.experiment)}: {record.config['model']['name']}, {len(record.prompts)} held-out prompts"
    )
    where = f"`{record.command}`; measured at commit {record.git_commit}, {record.device}."
    lines = [one.cells() for one in verdicts.results(record)]
    return "\n\n".join([f"# {about}", where, markdown(verdicts.HEADINGS, lines)]) + "\n"


def write_figure(folder: Path, record: records.FigureRecord) -> list[Path]:
    """`table.md` in `folder`, and the figure; the files that were written."""
    path = folder / TABLE
    path.write_bytes(as_text(record))
    return [path, *figures.of_figure(record, folder)]


def as_text(made: records.Rows | records.FigureRecord) -> bytes:
    """The table of rows or of a figure as a file."""
    return records.utf8(as_markdown(made) if isinstance(made, records.Rows) else figure_as_markdown(made))


def write_any(folder: Path, made: records.Rows | records.FigureRecord) -> list[Path]:
    """`write` or `write_figure`."""
    return write(folder, made) if isinstance(made, records.Rows) else write_figure(folder, made)


def keep(name: str, made: records.Rows | records.FigureRecord, folder: Path) -> list[Path]:
    """Rows or record in `analysis/data`, the table in `analysis/tables` and the figures in `analysis/figures`, under `name`.

    Figures that show samples are drawn from those in `folder`.
    """
    data, table = HERE / "data" / f"{name}.json.gz", HERE / "tables" / f"{name}.md"
    for place in ("data", "tables", "figures"):
        (HERE / place).mkdir(exist_ok=True)
    if isinstance(made, records.Rows):
        records.write_bundle(made, data)
    else:
        records.write_record(made, data)
    written = write_any(folder, made)
    shutil.copyfile(written[0], table)
    return [data, table, *(shutil.copyfile(path, HERE / "figures" / f"{name}_{path.name}") for path in written[1:])]


def main(arguments: list[str]) -> int:
    """The command line: exit code 1 if a folder holds no rows, after the others were done."""
    parser = argparse.ArgumentParser(prog="python -m analysis.tables", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder, or a file of analysis/data"
    )
    parser.add_argument("--keep", metavar="NAME", help="keep rows, table and figures of one folder in analysis/")
    given = parser.parse_args(arguments)
    if given.keep and len(given.folders) != 1:
        parser.error("--keep takes one folder")
    failed = False
    for path in given.folders:
        try:
            made = records.read_table(path)
        except records.RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        if given.keep and not path.is_dir():
            parser.error("--keep takes a run folder")
        if given.keep:
            print(*keep(given.keep, made, path), sep="\n")
        elif path.is_dir():
            print(*write_any(path, made), sep="\n")
        else:
            print(as_markdown(made) if isinstance(made, records.Rows) else figure_as_markdown(made))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
