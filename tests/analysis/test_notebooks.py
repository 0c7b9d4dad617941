"""The notebooks: stripped, without logic of their own, and they run. A cell that fails fails the test with its error."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
BY_NAME = {path.stem: path for path in NOTEBOOKS}
OF_RECORDS = ("paper_figures", "error_decomposition")  # these read what runs left behind
READS = {"analysis", "pandas", "matplotlib", "IPython", "numpy", "pathlib"}
OURS = {"erta", "experiments", "analysis", "run", "tests"}
MAY_IMPORT = {
    "paper_figures": {"analysis"},
    "error_decomposition": {"analysis"},
    "tour": {"erta", "analysis", "experiments"},
    "your_pipeline": {"erta"},
}
LOOP_STATEMENTS = 2
TIMEOUT_S = 600
NO_TORCH = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"


def read(name: str) -> NotebookNode:
    return nbformat.read(BY_NAME[name], as_version=4)


def code_of(notebook: NotebookNode) -> ast.Module:
    """The code of a notebook, magics left out."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for source in cells for line in source.splitlines() if not line.startswith("%")]
    return ast.parse("\n".join(lines))


def imports_of(tree: ast.Module) -> set[str]:
    """The packages that are imported."""
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in named}


def execute(notebook: NotebookNode, monkeypatch: pytest.MonkeyPatch) -> NotebookNode:
    """Run it as a user does, in its own folder, with this checkout's packages."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = {"metadata": {"path": str(ROOT / "analysis" / "notebooks")}}
    return NotebookClient(notebook, timeout=TIMEOUT_S, startup_timeout=TIMEOUT_S, resources=place).execute()


def images(notebook: NotebookNode) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebooks_are_these():
    assert set(BY_NAME) == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_stripped_and_valid(name):
    """Mutant: a notebook committed as it was run, or with the kernel of somebody's machine."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_no_logic_beyond_calls(name):
    """No functions, no classes, no long loops. Mutant: a helper that belongs into a package, with a test."""
    tree = code_of(read(name))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.While)
        if isinstance(node, ast.For):
            assert len([inner for inner in ast.walk(node) if isinstance(inner, ast.stmt)]) - 1 <= LOOP_STATEMENTS
    assert imports_of(tree) & OURS <= MAY_IMPORT[name]
    if name in OF_RECORDS:
        assert imports_of(tree) <= READS


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RECORDS)
def test_notebooks_of_records_run_without_torch(name, monkeypatch):
    """Mutant: `analysis` imports torch; a figure that is not drawn."""
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(NO_TORCH))
    assert images(execute(notebook, monkeypatch)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("tour", 8), ("your_pipeline", 1)])
def test_notebooks_of_pipelines_run(name, at_least, monkeypatch):
    done = execute(read(name), monkeypatch)
    text = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert images(done) >= at_least
    assert "25 of 50 steps computed" in text if name == "tour" else "the same clip again: True" in text
    assert "SignatureMismatch" in text or name == "tour"


@pytest.mark.slow
def test_a_folder_of_runs_that_does_not_exist_is_one_line(monkeypatch):
    """Mutant: thirty lines of traceback for a typing error."""
    notebook = read("error_decomposition")
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("RUNS = None"))
    cell.source = 'RUNS = "outputs/nowhere"'
    with pytest.raises(CellExecutionError):
        execute(notebook, monkeypatch)
    errors = [o for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert [error.traceback for error in errors] == [
        ["error: outputs/nowhere is not a folder: give a run folder, or one above it"]
    ]


def test_make_says_what_to_install_where_the_kernel_is_missing(tmp_path):
    """Mutant: a traceback of nbconvert, or pages without outputs."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    made = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "notebooks", f"BIN={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    said = [line for line in made.stderr.splitlines() if not line.startswith("make: ***")]
    assert made.returncode != 0
    assert said == [
        f'error: the notebooks need ipykernel and nbconvert: {tmp_path}/python -m pip install -e ".[notebooks]"'
    ]


def test_pages_load_nothing_from_elsewhere(tmp_path):
    """Rendered without running. Mutant: nbconvert's own template, which asks three hosts for scripts."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--no-prompt", "--template", "page"]
    command += [f"--TemplateExporter.extra_template_basedirs={ROOT / 'analysis' / 'notebooks'}"]
    subprocess.run([*command, "--output-dir", str(tmp_path), str(BY_NAME["tour"])], check=True, capture_output=True)
    page = (tmp_path / "tour.html").read_text(encoding="utf-8")
    assert "A tour of the method" in page
    assert "<script src" not in page and "cdnjs" not in page and '<link rel="stylesheet"' not in page
