"""Where errors come from, as a figure and as lines: `python -m analysis.decomposition FOLDER…`, from finished records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from analysis import plots
from analysis.records import DecompositionRecord, RecordError, read


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


def main(folders: list[str]) -> int:
    """The command line: exit code 1 if a folder holds no decomposition, after the others were done."""
    parser = argparse.ArgumentParser(prog="python -m analysis.decomposition", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder of experiment=decomposition"
    )
    failed = False
    for path in parser.parse_args(folders).folders:
        folder = path if path.is_dir() else path.parent
        try:
            record = read(folder)
            if not isinstance(record, DecompositionRecord):
                raise RecordError(f"{folder} holds a record of the kind {record.kind!r}, not a decomposition")
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        for part, value in lines(record):
            print(f"{part}: {value}")
        print(draw(record, folder) if record.by_step else f"{folder}: an earlier version kept no shares by step")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
