"""Records of every kind are typed: written, read back, and those of earlier versions brought to today's form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from analysis import records
from analysis.runs import load_prompts, load_runs
from tests.analysis.tables import one, row, table

EARLIER = Path(__file__).parent / "earlier"
KINDS = {
    "main": "main", "compare": "rows", "budgets": "rows", "decomposition": "decomposition", "model_card": "model_card",
    "speed": "speed", "calibrate": "calibration",
}  # fmt: skip


@pytest.mark.parametrize("folder", KINDS)
def test_records_of_the_first_version_are_read(folder):
    """Run folders as the first version left them. Mutant: a kind told by the folder's name."""
    record = records.read(EARLIER / folder)
    assert record.kind == KINDS[folder] and record.schema == "erta.record/2"
    assert records.parse(json.loads(json.dumps(records.to_json(record))), Path("x")) == record


def test_what_the_first_version_kept_comes_through():
    """Mutants: forwards of both sides swapped, the growth of errors or the plan's report lost."""
    main = records.read(EARLIER / "main")
    assert (main.steps.total, main.steps.computed) == (6, 3) and main.steps.mask == [1, 0, 1, 0, 1, 0]
    assert main.timing.forwards == 6 and main.metrics["psnr_db"] > 0 and main.plan_report["policy"] == "threshold"
    speed = records.read(EARLIER / "speed")
    assert (speed.forwards_uncached, speed.forwards, speed.pairs) == (6, 3, 1)
    growth = records.read(EARLIER / "decomposition").growth
    assert set(growth) == set(range(6)) and growth[5] == [pytest.approx(1, rel=1e-2)]
    assert records.read(EARLIER / "calibrate").planned[-1].computed == 4


def test_rows_of_the_first_version_are_rows():
    """Keys held label, site and budget, and a scene was one boolean. Mutants: the key as label; the last sigma lost."""
    compare = records.read_rows(EARLIER / "compare")
    found = {(r.label, r.computed) for r in compare.record.rows}
    assert ("none", None) in found and ("ertacache", 3) in found and ("uniform", 3) in found
    assert compare.samples[0].scene == {"all": compare.samples[0].scene["all"]}
    assert compare.setups["ertacache (3)"].calibration_s > 0
    budgets = records.read_rows(EARLIER / "budgets")
    labels = {r.label for r in budgets.record.rows}
    assert "policy + time, corrector off" in labels and {r.computed for r in budgets.record.rows} == {None, 3, 2, 1}
    assert "shape" in budgets.samples[0].scene and 0 < budgets.setups["policy (3)"].last_sigma < 1


def test_records_of_both_versions_tabulate_together(tmp_path, capsys):
    """Mutants: old records passed over in silence; a damaged one that stops everything."""
    shutil.copytree(EARLIER, tmp_path / "outputs")
    new = records.to_json(records.read(EARLIER / "main"))
    (tmp_path / "outputs" / "new").mkdir()
    (tmp_path / "outputs" / "new" / "record.json").write_text(json.dumps(new))
    (tmp_path / "outputs" / "cut").mkdir()
    (tmp_path / "outputs" / "cut" / "record.json").write_text(json.dumps(new)[:200])
    found = load_runs(tmp_path / "outputs")
    assert set(found["kind"]) == {"main", "rows", "calibration", "decomposition", "model_card", "speed"}
    runs = found[found["kind"] == "main"]
    assert sorted(Path(folder).name for folder in runs["folder"]) == ["main", "new"]
    assert runs["psnr_db"].nunique() == 1 and runs["computed"].tolist() == [3, 3]
    assert "cut/record.json cannot be read" in capsys.readouterr().err
    assert load_prompts(tmp_path / "outputs" / "main")["uncached.forwards"].tolist() == [12, 12]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "rwos"}, "is not a whole record"),
        ({"rows": None}, "rows.rows: input should be a valid list"),
        ({"seeds": ["a"]}, r"rows.seeds.0: input should be a valid integer"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path, change, said):
    data = {**records.to_json(table([(row("ertacache"), [one(30.0)])]).record), **change}
    (tmp_path / "record.json").write_text(json.dumps(data))
    with pytest.raises(records.RecordError, match=rf"record\.json .*{said}"):
        records.read(tmp_path)


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(records.RecordError, match=f"{tmp_path.name} holds no record"):
        records.read(tmp_path)
    with pytest.raises(records.RecordError, match="holds no rows: it is a record of the kind 'main'"):
        records.read_rows(EARLIER / "main")
    (tmp_path / "x.json.gz").write_bytes(b"not gzipped")
    with pytest.raises(records.RecordError, match=r"x\.json\.gz cannot be read"):
        records.read_rows(tmp_path / "x.json.gz")


def test_a_bundle_is_the_same_bytes_for_the_same_rows(tmp_path):
    """Mutants: the time of packing in the file; samples, set-ups or reasons left out."""
    rows = table([(row("ertacache"), [one(30.0), one(None)]), (row("fora"), [])], left_out={"fora (3)": "no modules"})
    for name in ("a.json.gz", "b.json.gz"):
        records.write_bundle(rows, tmp_path / name)
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
    assert records.read_rows(tmp_path / "a.json.gz") == rows
