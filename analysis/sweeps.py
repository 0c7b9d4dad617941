"""The runs of a sweep as one table and one plot: `python -m analysis.sweeps FOLDER…`, the folder that `run.py -m` names.

The sweep's `members/` holds a file a run, which says what was swept and where the run lies. Made of them are `table.md`,
`table.csv` (all numbers) and `sweep.png`. Runs that are not finished are listed, with their error if they failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from analysis import records, sweep_plot
from analysis.comparison import Comparison
from analysis.intervals import paired_interval
from analysis.records import RecordError
from analysis.runs import load_prompts
from analysis.tables import markdown

MEMBERS, TABLE, DATA, PLOT = "members", "table.md", "table.csv", "sweep.png"
STATES = {"started": "not finished", "failed": "failed", "finished": "finished"}
TARGET = "sweep.target_psnr_db"  # as the last command gives it: kept runs may hold an earlier one
Run = dict[str, Any]  # a row of a sweep's frame
SHOWN_DIGITS = 4  # of a swept number with more, such as a sampler draws


@dataclass(kw_only=True)
class Member:
    """A run of a sweep, as the run itself notes it.

    Attributes:
        number: its place in the sweep.
        overrides: of the configuration, `key=value`.
        folder: of its results, relative to the sweep's.
        error: one line, of a run that failed.
    """

    number: int
    overrides: list[str]
    folder: str
    state: Literal["started", "finished", "failed"]
    error: str | None = None


_MEMBER = TypeAdapter(Member)


@plain_dataclass(frozen=True)
class Sweep:
    """A sweep as it stands.

    Attributes:
        keys: of the configuration that differ between its runs.
        fixed: overrides that all of its runs have.
        frame: a row a run, in the sweep's order: the keys as columns, then `folder`, `state`, `error`, `headline` and, of
            finished runs of `experiment=main`, the numbers of `_numbers`.
        target_psnr_db: what the sweep looked for; None: nothing.
    """

    folder: Path
    keys: list[str]
    fixed: list[str]
    frame: pd.DataFrame
    target_psnr_db: float | None = None

    @property
    def finished(self) -> pd.DataFrame:
        return self.frame[self.frame.state == "finished"]

    @property
    def failed(self) -> pd.DataFrame:
        return self.frame[self.frame.state == "failed"]

    def runs(self, state: str | None = None) -> list[Run]:
        """All rows, or those of one state."""
        rows: list[Run] = self.frame.to_dict("records")  # type: ignore[assignment]
        return [row for row in rows if state in (None, row["state"])]

    @property
    def is_measured(self) -> bool:
        """Whether all finished runs are of `experiment=main`, so that their numbers are the table's columns."""
        return bool(len(self.finished)) and "ssim" in self.frame and bool(self.finished.ssim.notna().all())

    def name(self, run: Run) -> str:
        """What tells a run from the others: its swept keys, or its folder if there are none."""
        return " ".join(f"{key}={run[key]}" for key in self.keys if run[key] is not None) or run["folder"]


def read_members(folder: Path) -> list[Member]:
    """The runs of a sweep in its order. Raises RecordError where there are none, or one is damaged."""
    if not folder.is_dir():
        raise RecordError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give the folder of a sweep")
    files = list((folder / MEMBERS).glob("*.json"))
    if not files and any((folder / name).is_file() for name in (records.RECORD, "state.json")):
        raise RecordError(f"{folder} is the folder of one run: give that of a sweep, which holds {MEMBERS}/")
    if not files:
        raise RecordError(f"{folder} holds no sweep: give the folder that `python run.py -m` names at its end")
    found = []
    for file in files:
        try:
            found.append(_MEMBER.validate_json(file.read_bytes()))
        except (OSError, ValidationError) as error:
            raise RecordError(f"{file} is damaged: the same sweep, given again, writes it anew") from error
    return sorted(found, key=lambda member: member.number)


def load(folder: Path) -> Sweep:
    """A sweep with the numbers of its finished runs. A run whose files cannot be read counts as failed."""
    members = read_members(folder)
    settings = [dict(override.split("=", 1) for override in one.overrides if "=" in override) for one in members]
    names = dict.fromkeys(key for setting in settings for key in setting)
    keys = [key for key in names if len({setting.get(key) for setting in settings}) > 1]
    fixed = [f"{key}={settings[0][key]}" for key in names if key not in keys]
    rows = []
    for member, setting in zip(members, settings, strict=True):
        row = {key: setting.get(key) for key in keys}
        row |= {"folder": member.folder, "state": member.state, "error": member.error, "headline": None}
        if member.state == "finished":
            try:
                record = _record(folder / member.folder)
                row["headline"] = _headline(record, folder / member.folder)
                if isinstance(record, records.MainRecord):
                    row |= _numbers(record, folder / member.folder)
            except RecordError as error:
                row |= {"state": "failed", "error": str(error)}
        rows.append(row)
    frame = pd.DataFrame(rows)
    for name in (*keys, "error", "headline"):  # texts, None where there is none
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    target = pd.to_numeric(settings[0].get(TARGET, "none") if TARGET not in keys else "none", errors="coerce")
    return Sweep(folder, keys, fixed, frame, None if pd.isna(target) else float(target))


def _record(folder: Path) -> records.Record | None:
    """None of an experiment that leaves none."""
    return records.read(folder) if (folder / records.RECORD).is_file() else None


def _numbers(record: records.MainRecord, folder: Path) -> dict[str, Any]:
    """PSNR over the prompts whose samples are not identical, in dB; its interval needs two of them."""
    metrics = record.metrics
    try:
        psnr = load_prompts(folder).psnr_db.dropna().to_numpy(float)
    except (OSError, ValueError, AttributeError) as error:
        raise RecordError(f"{folder / records.PER_PROMPT} cannot be read: {error}") from error
    spread = paired_interval(psnr) if len(psnr) > 1 else None
    return {
        "model_name": record.config["model"]["name"],
        "prompts": len(record.prompts),
        "steps": record.steps.total,
        "computed": record.steps.computed,
        "forwards": record.timing.forwards,
        "speedup": metrics["speedup_denoise"],
        "speedup_possible": metrics.get("speedup_possible"),
        "psnr_db": float(psnr.mean()) if len(psnr) else None,
        "psnr_low_db": spread and spread.low,
        "psnr_high_db": spread and spread.high,
        "psnr_median_db": float(np.median(psnr)) if len(psnr) else None,
        "psnr_worst_db": float(psnr.min()) if len(psnr) else None,
        "ssim": metrics["ssim"],
        "lpips": metrics.get("lpips"),
        "scene": metrics.get("scene_accuracy", {}).get("all"),
    }


def _headline(record: records.Record | None, folder: Path) -> str:
    """One line on a run of any experiment."""
    match record:
        case records.MainRecord():
            psnr = record.metrics["psnr_db"]
            quality = "identical" if psnr is None else f"{psnr:.2f} dB"
            return f"{quality} at {record.metrics['speedup_denoise']:.2f}x"
        case records.RowsRecord():
            return _best_row(folder)
        case records.CalibrationRecord():
            return f"calibrated, {len(record.planned)} budgets planned"
        case records.SpeedRecord():
            return f"{record.speedup:.3f}x of {record.possible_speedup:.3f}x possible"
        case records.ModelCardRecord():
            return f"{record.parameters / 1e6:,.1f} M parameters, {record.flops_per_sample / 1e12:,.2f} TFLOPs a sample"
        case records.DecompositionRecord():
            parts = ", ".join(f"{part} {share:+.0%}" for part, share in record.shares.items())
            return f"{parts}; open loop {record.open_loop_over_total:.2f}"
    return ""


def _best_row(folder: Path) -> str:
    table = Comparison(records.read_rows(folder))
    rows = [row for row in table.outcomes if row.samples]
    scored = [(psnr, row.row) for row in rows if row.row.computed and (psnr := row.mean("psnr_db")) is not None]
    text = f"{len(rows)} of {len(table.outcomes)} rows"
    if not scored:
        return text
    psnr, best = max(scored, key=lambda pair: pair[0])
    return f"{text}; best {best.title} at {best.computed} of {table.record.num_steps}: {psnr:.2f} dB"


def _form(pattern: str) -> Callable[[Run, str], str]:
    return lambda run, name: "" if pd.isna(run[name]) else pattern.format(run[name])


def _psnr(run: Run, name: str) -> str:
    if pd.isna(run[name]):
        return "identical"
    interval = "" if pd.isna(run["psnr_low_db"]) else f" [{run['psnr_low_db']:.2f}, {run['psnr_high_db']:.2f}]"
    return f"{run[name]:.2f}{interval}"


COLUMNS: dict[str, tuple[str, Callable[[Run, str], str]]] = {
    "computed": ("computed", lambda run, name: f"{run[name]:.4g} of {run['steps']:g}"),
    "forwards": ("forwards", _form("{:.4g}")),
    "speedup": ("speed-up", _form("{:.2f}x")),
    "speedup_possible": ("possible", _form("{:.2f}x")),
    "psnr_db": ("PSNR dB [95 %]", _psnr),
    "psnr_median_db": ("median", _form("{:.2f}")),
    "psnr_worst_db": ("worst", _form("{:.2f}")),
    "ssim": ("SSIM", _form("{:.4f}")),
    "lpips": ("LPIPS", _form("{:.4f}")),
    "scene": ("scene right", _form("{:.0%}")),
}


def cells(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: the swept keys, then numbers, or the folder and a headline where not all runs have them."""
    keys = sweep.keys or ["folder"]
    swept = [[sweep_plot.short(run[key], SHOWN_DIGITS) for key in keys] for run in sweep.runs()]
    if not sweep.is_measured:
        rest = [[STATES[run["state"]], run["headline"] or "", run["folder"]] for run in sweep.runs()]
        rest = [line[: 3 if sweep.keys else 2] for line in rest]
        return [*keys, *["state", "result", "folder"][: 3 if sweep.keys else 2]], [
            a + b for a, b in zip(swept, rest, strict=True)
        ]
    shown = [name for name in COLUMNS if sweep.finished[name].notna().any() or name == "psnr_db"]
    lines = []
    for values, run in zip(swept, sweep.runs(), strict=True):
        unknown = [STATES[run["state"]], *[""] * (len(shown) - 1)]
        numbers = [COLUMNS[name][1](run, name) for name in shown] if run["state"] == "finished" else unknown
        lines.append(values + numbers)
    return [*keys, *(COLUMNS[name][0] for name in shown)], lines


def title(sweep: Sweep) -> str:
    """How many runs, over which keys, of what."""
    runs = f"{len(sweep.frame)} run{'s' * (len(sweep.frame) != 1)}"
    over = f"sweep over {' and '.join(sweep.keys)}: {runs}" if sweep.keys else f"sweep: {runs}"
    if not sweep.is_measured:
        return over
    models, prompts = sorted(set(sweep.finished.model_name)), sorted({int(count) for count in sweep.finished.prompts})
    return f"{over}, {' and '.join(models)}, {'/'.join(map(str, prompts))} prompts"


def remarks(sweep: Sweep) -> list[str]:
    """What is said below the table: the run nearest to the target, and every failed run with its error."""
    made = []
    if sweep.target_psnr_db is not None and sweep.is_measured and sweep.finished.psnr_db.notna().any():
        known = [run for run in sweep.runs("finished") if not pd.isna(run["psnr_db"])]
        run = min(known, key=lambda run: abs(run["psnr_db"] - sweep.target_psnr_db))
        made.append(
            f"nearest to {sweep.target_psnr_db:g} dB: {sweep.name(run)} ({run['psnr_db']:.2f} dB at {run['speedup']:.2f}x)"
        )
    made += [f"failed: {sweep.name(run)}: {run['error']}" for run in sweep.runs("failed")]
    left = [sweep.name(run) for run in sweep.runs("started")]
    return made + [f"not finished: {name}" for name in left]


def as_markdown(sweep: Sweep, plot: Path | None) -> str:
    """The table with what was fixed, the plot, the remarks and where each run lies."""
    heading = title(sweep)
    text = [f"# {heading[0].upper()}{heading[1:]}"]
    if sweep.fixed:
        text.append(f"All runs: `{' '.join(sweep.fixed)}`.")
    text.append(markdown(*cells(sweep)))
    if sweep.is_measured:
        text.append(
            "PSNR against the uncached samples: mean over prompts with its 95 % bootstrap interval, median and worst prompt. "
            "Speed-up: medians of denoising, measured in turns; possible: what that many forwards can give."
        )
    if plot:
        text.append(f"![{heading}]({plot.name})")
    if said := remarks(sweep):
        text.append("\n".join(f"- {line}" for line in said))
    if sweep.is_measured and sweep.keys:
        text.append("\n".join(f"- {sweep.name(run)}: `{run['folder']}`" for run in sweep.runs()))
    return "\n\n".join(text) + "\n"


def draw(sweep: Sweep) -> tuple[Path | None, str]:
    """The plot in the sweep's folder; None and the reason where there is nothing to draw."""
    path = sweep.folder / PLOT
    path.unlink(missing_ok=True)
    if not len(sweep.finished):
        return None, "no plot: no run is finished"
    if not sweep.is_measured:
        return None, "no plot: only runs of experiment=main have PSNR and speed-up"
    if not sweep.keys:
        return None, "no plot: no key was swept (several values of one, as in cache.threshold=0.04,0.08)"
    runs = sweep.finished[sweep.finished.psnr_db.notna()]
    if runs.empty:
        return None, "no plot: all samples are identical to the uncached ones"
    sweep_plot.figure(runs, sweep.keys, sweep.target_psnr_db).savefig(path)
    return path, ""


def write(sweep: Sweep) -> tuple[list[Path], str]:
    """Table, data and plot in the sweep's folder: what was written, and why there is no plot."""
    plot, reason = draw(sweep)
    table, data = sweep.folder / TABLE, sweep.folder / DATA
    table.write_text(as_markdown(sweep, plot), encoding="utf-8")
    sweep.frame.dropna(axis="columns", how="all").to_csv(data, index=False)
    return [table, data, *([plot] if plot else [])], reason


def show(sweep: Sweep, table: Callable[[str, list[str], list[list[str]]], None], note: Callable[[str], None]) -> None:
    """Write everything, and show it: `table` is given a title, headings and lines, `note` a line of text."""
    written, reason = write(sweep)
    table(title(sweep), *cells(sweep))
    for line in [*remarks(sweep), *([reason] if reason else [])]:
        note(line)
    note(f"sweep: {', '.join([str(written[0]), *(path.name for path in written[1:])])}")


def main(folders: list[str]) -> int:
    """The command line: exit code 1 if a folder holds no sweep, or no finished run, after the others were done."""
    parser = argparse.ArgumentParser(prog="python -m analysis.sweeps", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the folder of a sweep")
    is_bad = False
    for folder in parser.parse_args(folders).folders:
        try:
            sweep = load(folder)
            show(sweep, lambda name, *lines: print(name, "", markdown(*lines), "", sep="\n"), print)
            is_bad |= sweep.finished.empty
        except (RecordError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            is_bad = True
    return int(is_bad)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
