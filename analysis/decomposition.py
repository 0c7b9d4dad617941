"""Where errors come from, as figures and as lines: `python -m analysis.decomposition FOLDER…`, from finished records.

Of several runs, methods or budgets, one figure more is drawn that compares them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from analysis import plots, run_plots, style
from analysis.records import DecompositionRecord, RecordError, read
from analysis.run_rows import of_config

COMPARISON = "decompositions"


def lines(record: DecompositionRecord) -> list[list[str]]:
    """Each part's share of the final error, the open loop, and the growth of small errors by step."""
    made = [[part, f"{share:+.1%}"] for part, share in record.shares.items()]
    made.append(["open loop, over the total (no part of it)", f"{record.open_loop_over_total:.2f}"])
    for step, values in record.growth.items():
        spread = f"median {np.median(values):.2g}, {min(values):.2g} to {max(values):.2g}, {len(values)} runs"
        made.append([f"growth of an error after step {step}", spread])
    return made


def draw(record: DecompositionRecord, folder: Path) -> Path:
    """The figure, in `folder`/figures."""
    path = folder / "figures" / "decomposition.png"
    path.parent.mkdir(exist_ok=True)
    by_step = {part: np.array(shares) for part, shares in record.by_step.items()}
    plots.decomposition(by_step, record.growth, path)
    return path


def split(record: DecompositionRecord, folder: Path) -> run_plots.Split:
    """A run as the comparison shows it: method and budget, or the folder's name where the record does not know its steps."""
    said = of_config(record.config)
    method, steps = said["title"] or said["cache"], said["steps"]
    budget = folder.resolve().name if record.mask is None else f"{sum(record.mask)} of {steps} steps"
    norm = "" if record.total_norm is None else f"\nerror norm {record.total_norm:.3g}"
    return run_plots.Split(f"{method}\n{budget}{norm}", record.shares, record.by_step, record.mask)


def ordered(found: list[tuple[Path, DecompositionRecord]]) -> list[tuple[Path, DecompositionRecord]]:
    """By method in the order given, the largest budget first."""
    methods = list(dict.fromkeys(of_config(record.config)["cache"] for _, record in found))
    return sorted(found, key=lambda one: (methods.index(of_config(one[1].config)["cache"]), -sum(one[1].mask or [])))


def main(arguments: list[str]) -> int:
    """The command line: exit code 1 if a folder holds no decomposition, after the others were done."""
    parser = argparse.ArgumentParser(prog="python -m analysis.decomposition", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder of experiment=decomposition"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the comparison is drawn; by default in the folder above all"
    )
    given = parser.parse_args(arguments)
    found: list[tuple[Path, DecompositionRecord]] = []
    for path in given.folders:
        folder = path if path.is_dir() else path.parent
        try:
            record = read(folder)
            if not isinstance(record, DecompositionRecord):
                raise RecordError(f"{folder} holds a record of the kind {record.kind!r}, not a decomposition")
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        found.append((folder, record))
        if len(given.folders) > 1:
            print(f"{folder}:")
        for part, value in lines(record):
            print(f"{part}: {value}")
        print(draw(record, folder) if record.by_step else f"{folder}: an earlier version kept no shares by step")
    if len(found) > 1:
        out = given.out or Path(os.path.commonpath([folder.resolve().parent for folder, _ in found]))
        out.mkdir(parents=True, exist_ok=True)
        figure = run_plots.decompositions_figure([split(record, folder) for folder, record in ordered(found)])
        for file in style.save(figure, out / COMPARISON):
            print(file)
    return int(len(found) < len(given.folders))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
