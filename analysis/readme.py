"""What is made from the committed rows: `analysis/tables/`, and the tables of `analysis/README.md`: `python -m analysis.readme`.

Between `<!-- generated: NAME VIEW -->` and `<!-- /generated -->` stands what `NAME.json.gz` of `analysis/data` says: its claims
with their verdicts (`verdicts`), its rows (`rows`), or both (`all`), with the command, date, commit and device. Everything
outside is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from analysis import records, tables, verdicts
from analysis.comparison import Comparison, results_of

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
VIEWS = ("verdicts", "rows", "all")
_PART = re.compile(r"<!-- generated: (?P<name>\S+) (?P<view>\w+) -->\n.*?<!-- /generated -->", re.S)


def generated(text: str) -> str:
    """The page with every generated part made anew. Raises RecordError for a name or a view that does not exist."""
    return _PART.sub(
        lambda found: f"{found[0].splitlines()[0]}\n\n{part(*found.groups())}\n\n<!-- /generated -->", text
    )


def part(name: str, view: str) -> str:
    """What is said of one file of `analysis/data`."""
    if view not in VIEWS:
        raise records.RecordError(f"{name}: there is no view {view!r}; choose from {', '.join(VIEWS)}")
    made = records.read_table(HERE / "data" / f"{name}.json.gz")
    record = made.record if isinstance(made, records.Rows) else made
    text = []
    if view != "verdicts" and isinstance(made, records.Rows):
        found = tables.sections(Comparison(made))
        for section in found:
            text += [f"**{section.title}**"] if len(found) > 1 else []
            text += [tables.markdown(*tables.without_empty_columns(section.headings, section.lines))]
            text += [f"Not run: {title} ({reason})." for title, reason in section.not_run]
    if view != "rows":
        said = results_of(made)
        ours = f"ours ({record.config['model']['name']})"
        headings = [ours if heading == "ours" else heading for heading in verdicts.HEADINGS[:-1]]
        text += [tables.markdown(headings, [one.cells()[:-1] for one in said])] if said else []
    return "\n\n".join([*text, _provenance(record, made if isinstance(made, records.Rows) else None)])


def _provenance(record: records.RowsRecord | records.FigureRecord, rows: records.Rows | None) -> str:
    where, commit = record.device, record.git_commit or "not recorded"
    if rows is not None and rows.setups:
        where = "; ".join(sorted({one.ran_on for one in rows.setups.values()}))
        commit = ", ".join(sorted({one.commit[:7] for one in rows.setups.values() if one.commit})) or commit
    date = f", {record.date}" if record.date else ""
    return f"`{record.command}`{date}, commit {commit[:40]}, {where}, {len(record.prompts)} samples a row."


def main(arguments: list[str]) -> int:
    """The command line: exit code 1 if, with `--check`, the page is not what the rows say, or a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m analysis.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would change")
    given = parser.parse_args(arguments)
    try:
        made = {PAGE: records.utf8(generated(PAGE.read_text(encoding="utf-8")))}
        made |= {HERE / "tables" / f"{name}.md": tables.as_text(rows) for name, rows in kept().items()}
    except records.RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    changed = [path for path, text in made.items() if not path.is_file() or path.read_bytes() != text]
    for path in changed:
        print(f"{path} is not what the rows say: python -m analysis.readme" if given.check else path)
        if not given.check:
            path.write_bytes(made[path])
    return int(given.check and bool(changed))


def kept() -> dict[str, records.Rows | records.FigureRecord]:
    """Everything in `analysis/data` that has a table, by name."""
    found = {path.name.removesuffix(".json.gz"): path for path in sorted((HERE / "data").glob("*.json.gz"))}
    return {name: records.read_table(path) for name, path in found.items() if not name.startswith("decomposition")}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
