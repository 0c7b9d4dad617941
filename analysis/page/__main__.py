"""The results page: `python -m analysis.page [FOLDER…]`, from the kept rows and any run folders. Samples nothing.

With `--keep-clips FOLDER` the first pairs of a run of `experiment=main` are kept in `analysis/data/clips/MODEL` for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from analysis import records
from analysis.page import film, results
from analysis.records import MainRecord, RecordError, utf8

OUT = Path("outputs/report/index.html")


def keep_clips(folder: Path, data: Path = results.DATA) -> Path:
    """The first pairs of a run as a run folder of their own, named after its model; one that was kept before goes.

    Raises RecordError if it is no finished run of `experiment=main`, or lacks a clip.
    """
    record = records.read(folder)
    if not isinstance(record, MainRecord):
        raise RecordError(f"{folder} holds a record of the kind {record.kind!r}: clips are those of experiment=main")
    rows = results.read_lines(folder)[: results.SHOWN_PAIRS]
    film.gallery(folder, rows, len(rows))  # can be shown
    target = data / results.CLIPS / record.config["model"]["name"]
    shutil.rmtree(target, ignore_errors=True)
    for row in rows:
        for arm in film.ARMS:
            name = Path("samples") / arm / f"{row['index']:03d}.webp"
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)
    short = dataclasses.replace(
        record, prompts=record.prompts[: len(rows)], seeds=record.seeds[: len(rows)], missing={}
    )  # why something is missing names folders of one machine
    text = json.dumps(records.to_json(short), indent=1, ensure_ascii=False) + "\n"
    (target / records.RECORD).write_bytes(utf8(text))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (target / records.PER_PROMPT).write_bytes(utf8(lines))
    return target


def main(arguments: list[str], data: Path = results.DATA) -> int:
    """The command line: exit code 1 if something named cannot be shown, after the page was made from the rest."""
    parser = argparse.ArgumentParser(prog="python -m analysis.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a run folder, or a folder of them")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"the page; without it {OUT}")
    parser.add_argument("--keep-clips", type=Path, metavar="FOLDER", help="keep a run's first pairs of clips here")
    given = parser.parse_args(arguments)
    try:
        if given.keep_clips is not None:
            print(keep_clips(given.keep_clips, data))
            return 0
        found = results.gather([*results.kept(data), *given.folders])
        for problem in found.problems:
            print(f"error: {problem}", file=sys.stderr)
        results.write(found, given.out)
    except (RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(given.out)
    return int(bool(found.problems))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
