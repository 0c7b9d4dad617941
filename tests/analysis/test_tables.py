"""Tables are made from finished rows alone, and every committed one is what its committed rows say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import readme, records, tables
from tests.analysis.tables import one, row, table
from tests.analysis.test_records import EARLIER

DATA = sorted(p for p in (tables.HERE / "data").glob("*.json.gz") if not p.name.startswith("decomposition"))
LOST = "The rows behind this table are lost"


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name.split(".")[0])
def test_committed_tables_are_what_their_rows_say(path):
    """Mutant: a number changed in the table, or in the rows, by hand."""
    name = path.name.removesuffix(".json.gz")
    made = records.read_table(path)
    is_rows = isinstance(made, records.Rows)
    record = made.record if is_rows else made
    assert record.git_commit and record.command.startswith("python run.py")
    text = tables.as_markdown(made) if is_rows else tables.figure_as_markdown(made)
    assert text == (tables.HERE / "tables" / f"{name}.md").read_text(encoding="utf-8")


def test_every_committed_table_of_rows_has_its_rows_or_says_that_they_are_lost():
    known = {path.name.removesuffix(".json.gz") for path in DATA}
    assert {"compare_quick_wan21_tiny", "compare_quick_flux_tiny"} <= known
    for path in (tables.HERE / "tables").glob("*.md"):
        assert path.stem in known or path.stem == "model_cards" or LOST in path.read_text(encoding="utf-8"), path


def test_a_folder_of_the_first_version_tabulates(tmp_path, capsys):
    """Through the command line, and without torch. Mutant: a folder without rows ends the others."""
    for name in ("compare", "budgets"):
        (tmp_path / name).mkdir()
        for path in (EARLIER / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    assert tables.main([str(tmp_path), str(tmp_path / "compare"), str(tmp_path / "budgets")]) == 1
    assert "holds no record" in capsys.readouterr().err
    text = (tmp_path / "compare" / "table.md").read_text()
    assert "## 3 of 6 steps" in text and "| uniform | " in text and "| uncached | 12 | 1.00x | reference |" in text
    assert (tmp_path / "compare" / "figures" / "methods.png").is_file()
    text = (tmp_path / "budgets" / "table.md").read_text()
    assert "## 2 of 6 steps" in text and "against policy (95 %)" in text
    code = f"import sys; from analysis import tables; tables.main({[str(tmp_path / 'budgets')]}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_is_kept_stands_in_analysis(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path)
    for name in ("data", "tables", "figures"):
        (tmp_path / name).mkdir()
    timed = [one(30.0, uncached_s=2.0)] * 2
    rows = table(
        [(row("none", None), [one(None, forwards=12)] * 2), (row("ertacache"), timed), (row("uniform"), timed)]
    )
    written = tables.keep("mine", rows, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "data/mine.json.gz", "tables/mine.md", "figures/mine_methods.png", "figures/mine_pareto.png",
    ]  # fmt: skip
    assert all(path.is_file() for path in written) and list((tmp_path / "tables").iterdir()) == [written[1]]
    assert (tmp_path / "figures" / "methods.pdf").read_bytes().startswith(b"%PDF")
    assert tables.as_markdown(records.read_rows(written[0])) == written[1].read_text()


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path):
    rows = table([(row("ertacache"), [one(30.0), one(31.0)])])
    (tmp_path / "record.json").write_text(json.dumps(records.to_json(rows.record)))
    lines = [json.dumps(records.to_json(sample)) for sample in rows.samples]
    (tmp_path / "rows.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    found = records.read_rows(Path(tmp_path))
    assert [sample.psnr_db for sample in found.samples] == [30.0]
    assert "not finished: 1 of 2 samples" in tables.as_markdown(found)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.jsonl", "{]\n", "line 1, is damaged"),
        ("left_out.json", "[]", "a row is not whole"),
        ("record.json", '{"table": {}}', "is not a whole record: it lacks"),
        ("record.json", '{"planned": []}', "is not a whole record"),
        ("record.json", "{", "cannot be read"),
    ],
)
def test_damaged_folders_are_named_in_a_line(tmp_path, capsys, name, text, said):
    """Mutant: a raw Python error."""
    (tmp_path / "record.json").write_text(json.dumps(records.to_json(table([(row("ertacache"), [one(30.0)])]).record)))
    (tmp_path / name).write_text(text)
    assert tables.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_file_of_a_run_folder_is_not_taken_for_its_rows(tmp_path, capsys):
    made = table([(row("ertacache"), [one(30.0)])])
    (tmp_path / "record.json").write_text(json.dumps(records.to_json(made.record)))
    assert tables.main([str(tmp_path / "record.json")]) == 1
    assert "holds no rows: give the run folder" in capsys.readouterr().err


def test_generated_parts_of_the_results_page_are_what_the_rows_say():
    """Mutant: a number changed in the page by hand."""
    text = readme.PAGE.read_text(encoding="utf-8")
    assert readme.generated(text) == text
    (tail,) = readme.generated("<!-- generated: compare_quick_flux_tiny rows -->\nold\n<!-- /generated -->").split(
        "old"
    )
    assert "| ERTACache | 15 |" in tail and "`python run.py" in tail and tail.count("<!--") == 2
    for wrong in ("nothing rows", "compare_quick_flux_tiny sideways"):
        with pytest.raises(records.RecordError, match=r"nothing|sideways"):
            readme.generated(f"<!-- generated: {wrong} -->\n<!-- /generated -->")
