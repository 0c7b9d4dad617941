"""The notebooks, executed, as pages that load nothing from elsewhere: `python -m analysis.notebook_pages [NOTEBOOK…]`."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
NOTEBOOKS = PROJECT / "analysis" / "notebooks"
TEMPLATE = "page"  # a folder of `NOTEBOOKS`
NEEDS = ("nbclient", "nbconvert", "ipykernel")
START_S = 600  # until a kernel answers: on a busy machine it takes more than the usual minute
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}  # bars are for screens, not for pages


def execute(notebook: Any, folder: Path = NOTEBOOKS) -> Any:
    """Run a notebook's cells in `folder`, with this project's packages; the notebook with its outputs.

    Raises `nbclient.exceptions.CellExecutionError` for a cell that fails.
    """
    from nbclient import NotebookClient

    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=START_S,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute(env=environment)


def page(notebook: Any, title: str) -> str:
    """A notebook as HTML, its images and styles inside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name=TEMPLATE,
        extra_template_basedirs=[str(NOTEBOOKS)],
        embed_images=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    return exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})[0]


def render(path: Path, out: Path) -> Path:
    """Run the notebook at `path` and write its page to `out`. Raises what `execute` raises, ValueError for no notebook."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"is no notebook: {str(error).splitlines()[0]}") from error
    done = page(execute(notebook, path.resolve().parent), path.stem)
    out.mkdir(parents=True, exist_ok=True)
    written = out / f"{path.stem}.html"
    written.write_text(done, encoding="utf-8")
    return written


def main(arguments: list[str]) -> int:
    """The command line: exit code 1 if something is missing, or if a notebook failed, after the others were done."""
    parser = argparse.ArgumentParser(prog="python -m analysis.notebook_pages", description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="none: all of analysis/notebooks")
    parser.add_argument("--out", type=Path, default=Path("outputs/notebooks"), metavar="FOLDER", help="for the pages")
    given = parser.parse_args(arguments)
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        print(f'error: {", ".join(missing)} missing: python -m pip install -e ".[notebooks]"', file=sys.stderr)
        return 1
    from nbclient.exceptions import CellExecutionError

    failed = False
    for path in given.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        try:
            print(render(path, given.out))
        except CellExecutionError as error:
            print(f"error: {path.name}: {error.ename}: {error.evalue}", file=sys.stderr)
            failed = True
        except (ValueError, RuntimeError) as error:  # no notebook, or a kernel that died
            print(f"error: {path}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
