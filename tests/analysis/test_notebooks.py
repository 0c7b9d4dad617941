"""The notebooks: stripped, without logic of their own, and they run. A cell that fails fails the test with its error."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from analysis import notebook_pages

NOTEBOOKS = Path(__file__).resolve().parents[2] / "analysis" / "notebooks"
BY_NAME = {path.stem: path for path in NOTEBOOKS.glob("*.ipynb")}
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
def test_notebooks_of_records_run_without_torch(name):
    """Mutant: `analysis` imports torch; a figure that is not drawn."""
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(NO_TORCH))
    assert images(notebook_pages.execute(notebook)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("tour", 7), ("your_pipeline", 1)])
def test_notebooks_of_pipelines_run(name, at_least):
    done = notebook_pages.execute(read(name))
    text = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert images(done) >= at_least
    assert "25 of 50 steps computed" in text if name == "tour" else "the same clip again: True" in text
    assert "SignatureMismatch" in text or name == "tour"


@pytest.mark.slow
def test_a_folder_of_runs_that_does_not_exist_is_one_line(tmp_path, capsys):
    """Mutants: thirty lines of traceback for a typing error; the notebooks after it are not rendered."""
    notebook = read("error_decomposition")
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("RUNS = None"))
    cell.source = 'RUNS = "outputs/nowhere"'
    simple = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    nbformat.write(simple, tmp_path / "b.ipynb")
    files = [str(tmp_path / name) for name in ("a.ipynb", "b.ipynb")]
    assert notebook_pages.main([*files, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: a.ipynb: RecordError: outputs/nowhere is not a folder: give a run folder, or one above it"]
    assert "42" in (tmp_path / "out" / "b.html").read_text(encoding="utf-8")


def test_no_notebook_is_one_line(tmp_path, capsys):
    (tmp_path / "a.ipynb").write_text("{")
    assert notebook_pages.main([str(tmp_path / "a.ipynb"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "a.ipynb: is no notebook" in said and len(said.splitlines()) == 1 and not list(tmp_path.glob("*.html"))


def test_a_missing_kernel_says_what_to_install(monkeypatch, capsys):
    """Mutant: a traceback of nbconvert."""
    monkeypatch.setattr(notebook_pages, "find_spec", lambda name: None if name == "ipykernel" else name)
    assert notebook_pages.main([]) == 1
    assert capsys.readouterr().err == 'error: ipykernel missing: python -m pip install -e ".[notebooks]"\n'


def test_pages_load_nothing_from_elsewhere():
    """Rendered without running. Mutant: nbconvert's own template, which asks three hosts for scripts."""
    text = notebook_pages.page(read("tour"), "tour")
    assert "A tour of the method" in text and "<title>tour</title>" in text
    assert "<script src" not in text and "cdnjs" not in text and '<link rel="stylesheet"' not in text
