"""All runs as one table: `python -m analysis.runs SOURCE…`, from records, offline W&B files, or the W&B server.

A source is a folder of run folders (or `analysis/data`), a folder that holds nothing but W&B files (`outputs/…/wandb`), or
`wandb:ENTITY/PROJECT`. Every run of `main` is a row, and so is every row of a table; what cannot be read is named and passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis import earlier, records, tables, wandb_runs
from analysis.records import RecordError
from analysis.run_rows import BUDGETS, FACTS, FINISHED, METRICS, Row, flat, history_rows, known, of_config, read_run

NOT_COLUMNS = (
    "experiment.",
    "wandb.",
    "cache.about.",
    "resume",
    "seed",
)  # beginnings of keys that say no more of a run
NAMES = {"model.name": "model", "sampler.name": "sampler", "cache.name": "cache"}  # that are columns
HIDDEN = [
    "run",
    "folder",
    "kind",
    "group",
    "device",
    "commit",
    "overrides",
    "psnr_low",
    "psnr_high",
    "reason",
]  # unless asked
FORMS = {
    "ssim": ".4f", "ms_ssim": ".4f", "lpips": ".4f", "speedup_denoise": ".2f", "speedup_possible": ".2f", "forwards": ".4g",
    "scene_accuracy": ".1%", "scene_accuracy_uncached": ".1%", "cache_bytes": ",.0f", "calibration_s": ".0f",
    "injected": "+.1%", "propagated": "+.1%", "grid": "+.1%", "flops_per_sample": ".4g", "parameters": ".4g",
}  # fmt: skip
FORMATS = ("text", "markdown", "latex", "csv")


@dataclass(frozen=True)
class Run:
    """What was found of one run: its rows, its configuration, its name and its folder."""

    rows: list[Row]
    config: dict[str, Any]
    name: str
    folder: str | None


def tell(line: str) -> None:
    """A line on stderr, where the table is not disturbed."""
    print(line, file=sys.stderr)


def load_runs(*sources: str | Path, api: Any = None, tell: Callable[[str], None] = tell) -> pd.DataFrame:
    """One frame of all runs: what was run, with what budget, its metrics, and every setting that differs between them.

    Args:
        sources: see above; by default `outputs`.
        api: a `wandb.Api`, for a source online.
        tell: is given a line for everything that is passed over.

    Raises RecordError for a source that does not exist or holds no runs, and where W&B cannot be reached.
    """
    found: list[Run] = []
    for source in sources or ("outputs",):
        found += _read(str(source), api, tell)
    return _frame(found)


def _read(source: str, api: Any, tell: Callable[[str], None]) -> list[Run]:
    if source.startswith(wandb_runs.API):
        return _of_wandb(wandb_runs.read_api(source.removeprefix(wandb_runs.API), api), source, tell)
    root = Path(source)
    if not root.exists():
        raise RecordError(f"{source}: no such file or folder")
    paths = _record_paths(root)
    files = wandb_runs.find_files(root) if root.is_dir() else [root] if root.suffix == ".wandb" else []
    if not paths and not files:
        raise RecordError(f"{source} holds no runs: neither records nor W&B files")
    return _of_records(paths, tell) if paths else _of_wandb(wandb_runs.read_files(files, tell), source, tell)


def _record_paths(root: Path) -> list[Path]:
    """Run folders below a folder, and the files of `analysis/data`."""
    if root.is_file():
        return [root] if root.name.endswith((".json", ".json.gz")) else []
    names = (records.RECORD, *earlier.NAMES)
    return sorted({path.parent for name in names for path in root.glob(f"**/{name}")} | {*root.glob("**/*.json.gz")})


def _of_records(paths: list[Path], tell: Callable[[str], None]) -> list[Run]:
    found = []
    for path in paths:
        try:
            rows, config = read_run(path)
        except RecordError as error:
            tell(f"passed over: {error}")
            continue
        name = path.name.split(".")[0] if path.is_file() else path.resolve().name
        found.append(Run(rows, config, name, str(path)))
    return found


def _of_wandb(runs: list[wandb_runs.WandbRun], source: str, tell: Callable[[str], None]) -> list[Run]:
    """What runs told W&B at their end; of one that was killed, what its samples come to."""
    found = []
    for run in runs:
        if not run.is_ours:
            tell(
                f"passed over: {source}, run {run.name or run.id}, is of another project: its configuration is not ours"
            )
            continue
        rows = run.summary.get(wandb_runs.FRAME)
        if rows is None:
            rows = [known({**of_config(run.config), **row}) for row in history_rows(run.history)]
        found.append(Run(rows, run.config, run.name, run.folder))
    return found


def _frame(runs: list[Run]) -> pd.DataFrame:
    """One row a row of every run, the settings that differ behind the metrics."""
    rows = [{"folder": run.folder, "run": run.name, **row} for run in runs for row in run.rows]
    settings = [_settings(run.config, row) for run in runs for row in run.rows]
    keys = {key: None for one in settings for key in one if not key.startswith(NOT_COLUMNS) and key not in NAMES}
    differ = [
        key for key in keys if len({repr(one[key]) for one in settings if key in one}) > 1 and "_target_" not in key
    ]
    made = [{**row, **{key: one.get(key) for key in differ}} for row, one in zip(rows, settings, strict=True)]
    return pd.DataFrame(made, columns=["folder", *FACTS, *METRICS, *sorted(differ)])


def _settings(config: dict[str, Any], row: Row) -> dict[str, Any]:
    """The configuration that a row was made with: those of a table's rows are told by what they override."""
    settings = flat(config)
    if row.get("kind") != "rows" and "overrides" not in row:
        return settings
    given = [override.partition("=") for override in row.get("overrides", "").split(" ")]
    own = {key: yaml.safe_load(value) for key, _, value in given if "." in key}
    return {**{key: value for key, value in settings.items() if not key.startswith("cache.")}, **own}


def load_prompts(folder: str | Path) -> pd.DataFrame:
    """One row a prompt of one run, arms as column prefixes (`cached.denoise_s`)."""
    lines = (Path(folder) / records.PER_PROMPT).read_text(encoding="utf-8").splitlines()
    return pd.json_normalize([json.loads(line) for line in lines])


def shown(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """The columns that people want to see, as text, and what is the same in all rows.

    Settings that follow from the choice of a model, sampler or cache are left out, and so are empty columns.
    """
    frame = frame.dropna(axis="columns", how="all")
    follows = [key for key in frame if _follows(frame, str(key))]
    frame = frame.drop(
        columns=[*follows, *(key for key in HIDDEN if key in frame and key != "run" and key != "reason")]
    )
    if frame.get("cache") is not None and "title" in frame and "row" in frame:
        frame = frame.drop(columns=["row"])
    if "budget" in frame:  # which says it
        frame = frame.drop(columns=[key for key in (f"cache.{budget}" for budget in BUDGETS) if key in frame])
    if "budget" in frame and all(_is_told_by_steps(row) for _, row in frame.iterrows()):
        frame = frame.drop(columns=["budget"])
    facts = [key for key in frame if key not in METRICS and key not in ("run", "computed")]
    same = {
        key: _text(key, frame[key].iloc[0]) for key in facts if len(frame) > 1 and frame[key].nunique(dropna=False) == 1
    }
    frame = frame.drop(columns=list(same))
    text = pd.DataFrame({key: [_text(str(key), value) for value in frame[key]] for key in frame}, index=frame.index)
    return text, {str(key): value for key, value in same.items() if value}


def _is_told_by_steps(row: Any) -> bool:
    return pd.isna(row["budget"]) or row["budget"] == f"steps={row.get('computed'):g}"


def _follows(frame: pd.DataFrame, key: str) -> bool:
    """Whether a setting has one value for each choice of its group."""
    owner = key.split(".")[0]
    if "." not in key or owner not in frame or frame[owner].nunique() < 2:
        return False
    return int(frame.groupby(owner, dropna=False)[key].nunique(dropna=False).max()) == 1


def _text(key: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    form = FORMS.get(key, ".2f" if key.endswith("_db") else ".3g" if key in METRICS else ".6g")
    return f"{value:{form}}"


def render(frame: pd.DataFrame, form: str, columns: Sequence[str] = ()) -> str:
    """The frame as `text`, `markdown`, `latex` or `csv`; the last holds every column that is not empty, in full precision.

    Raises RecordError for columns that do not exist.
    """
    if unknown := [key for key in columns if key not in frame]:
        raise RecordError(f"there is no column {', '.join(unknown)}. Choose from {', '.join(map(str, frame.columns))}")
    if form == "csv":
        return (frame[list(columns)] if columns else frame.dropna(axis="columns", how="all")).to_csv(index=False)
    if columns:
        text = pd.DataFrame({key: [_text(key, value) for value in frame[key]] for key in columns})
        same: dict[str, str] = {}
    else:
        text, same = shown(_with_interval(frame))
    said = "the same in all: " + ", ".join(f"{key} {value}" for key, value in same.items()) if same else ""
    if form == "latex":
        return "\n".join([*([f"% {said}"] if said else []), text.to_latex(index=False, escape=True)])
    if form == "markdown":
        cells = [[str(cell).replace("|", r"\|") for cell in line] for line in text.to_numpy().tolist()]
        return (
            "\n\n".join([*([said[0].upper() + said[1:] + "."] if said else []), tables.markdown(list(text), cells)])
            + "\n"
        )
    return "\n".join([*([said] if said else []), text.to_string(index=False)]) + "\n"


def _with_interval(frame: pd.DataFrame) -> pd.DataFrame:
    """PSNR and its interval in one cell."""

    def cell(row: Any) -> str | None:
        if pd.isna(row["psnr_db"]):
            return None
        interval = "" if pd.isna(row["psnr_low"]) else f" [{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]"
        return f"{row['psnr_db']:.2f}{interval}"

    return frame.assign(psnr_db=[cell(row) for _, row in frame.iterrows()])


def main(arguments: list[str]) -> int:
    """The command line: exit code 1 if a source holds no runs, or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m analysis.runs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", nargs="*", default=["outputs"], metavar="SOURCE", help="a folder, or wandb:ENTITY/PROJECT"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table, which is printed")
    parser.add_argument("--columns", default="", metavar="A,B", help="which columns, else those that say something")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the runs, as PNG and PDF")
    given = parser.parse_args(arguments)
    try:
        frame = load_runs(*given.sources)
        if frame.empty:
            raise RecordError(f"{', '.join(given.sources)}: no run has anything to show")
        print(render(frame, given.format, [key for key in given.columns.split(",") if key]), end="")
        if given.figures:
            from analysis.run_plots import draw  # not before: drawing takes a second to load

            for path in draw(frame[frame["state"] == FINISHED], given.figures):
                tell(str(path))
    except RecordError as error:
        tell(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
