"""The terminal: an output that nobody reads is no traceback, and the work goes on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.commands import QUICK, folders
from tests.soak import ROOT

# what a pipe into `head -1` does: the reader is gone after the first line
BEGIN = "import os, sys; from experiments.output import console; console.survive_closed_output(); "


def read_one_line(arguments: list[str], folder, **how) -> tuple[int, str, str]:
    """Exit code, the first line of what a command prints, and its errors; nobody reads the rest."""
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=surroundings, stdout=subprocess.PIPE, stderr=errors, **how
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        process.stdout.close()
        code = process.wait(timeout=600)
    return code, first.decode(), (folder / "errors.txt").read_text()


@pytest.mark.parametrize("write", ["print('x' * 100000, flush=True)", "console.note('x' * 100000)"])
def test_what_nobody_reads_is_lost_and_nothing_else(tmp_path, write):
    """Python's own output and rich's. Mutants: BrokenPipeError; one at the end of the process, when Python flushes."""
    end = "open('done', 'w').close()"
    code, first, errors = read_one_line(["-c", f"{BEGIN}print('one', flush=True); {write}; {write}; {end}"], tmp_path)
    assert (code, first, errors) == (0, "one\n", "") and (tmp_path / "done").is_file()


@pytest.mark.slow
def test_a_run_whose_output_is_closed_ends_with_its_record(tmp_path, weights):
    """`python run.py … | head -1`. Mutant: a traceback, and no record."""
    job = [*QUICK, f"model.path={weights}", "cache=uniform", "bench=fidelity", "bench.num_prompts=1"]
    code, first, errors = read_one_line([str(ROOT / "run.py"), *job], tmp_path)
    assert code == 0 and first.strip() and "Traceback" not in errors and "Error" not in errors
    (folder,) = folders(tmp_path)
    assert (folder / "record.json").is_file() and (folder / "report.html").is_file()
