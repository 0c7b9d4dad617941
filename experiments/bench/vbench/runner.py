"""Talks to the VBench worker, a process of its own that may have another interpreter; writes the clips it reads."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from erta.errors import ErtaError

WORKER = Path(__file__).with_name("worker.py")
BASE_TIMEOUT_S, TIMEOUT_PER_VIDEO_S = 1800, 120
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")  # the worker is alone
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # what is missing was named before, not fetched


class UnreadableVideoError(ErtaError):
    """A clip on disk is damaged."""


def find_info(python: str | None) -> Path | None:
    """VBench_full_info.json of the package; None if this interpreter is to run the worker and has no vbench.

    Raises ErtaError if `python` is not an interpreter, or has no vbench.
    """
    if python is None:
        spec = find_spec("vbench")
        folders = list(spec.submodule_search_locations or []) if spec else []
        return Path(folders[0]) / "VBench_full_info.json" if folders else None
    if shutil.which(python) is None:
        raise ErtaError(f"bench.python={python} is not an interpreter")
    try:
        found = _ask({"task": "locate"}, python, BASE_TIMEOUT_S)
    except ErtaError as error:
        raise ErtaError(f"bench.python={python} cannot run the worker: {error}") from error
    if found["info"] is None:
        raise ErtaError(f"bench.python={python} has no vbench package; `make vbench-env` makes .venv-vbench, which has")
    return Path(found["info"])


def failed_imports(dimensions: list[str], python: str | None) -> dict[str, str]:
    """For each dimension whose code the worker's interpreter cannot import, the module or the error."""
    return _ask({"task": "imports", "dimensions": dimensions}, python, BASE_TIMEOUT_S)


def evaluate(
    dimension: str,
    arms: dict[str, Path],
    prompts: dict[str, str],
    python: str | None = None,
    entries: list[dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Score the clips of each arm: {arm: {"score", "per_video": {file: score}}}.

    Args:
        arms: a folder for each arm, with the same file names in all of them.
        prompts: file name → prompt, for clips of any prompt (VBench's custom_input mode).
        entries: the suite's entries of this dimension instead, each with its file names under `videos`.

    Raises UnreadableVideoError for a clip that cannot be decoded, OSError if the disk is full, and ErtaError with
    the worker's last line if it fails otherwise.
    """
    names = list(prompts) if entries is None else [name for entry in entries for name in entry["videos"]]
    request: dict[str, Any] = {
        "task": "score",
        "dimension": dimension,
        "arms": {arm: str(folder.absolute()) for arm, folder in arms.items()},
        "names": list(dict.fromkeys(names)),
        "prompts": prompts,
        "entries": entries,
    }
    answer = _ask(request, python, BASE_TIMEOUT_S + TIMEOUT_PER_VIDEO_S * len(names) * len(arms))
    if "unreadable" in answer:
        paths = answer["unreadable"]
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        raise UnreadableVideoError(
            f"{paths[0]} cannot be decoded{more}.\nDelete it, and the same command makes it anew and goes on."
        )
    return answer


def _ask(request: dict[str, Any], python: str | None, timeout_s: float) -> dict[str, Any]:
    """Run the worker once and return its answer."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps({**request, "scratch": scratch}))
        surroundings = {key: value for key, value in os.environ.items() if not key.startswith(OF_RANKS)}
        command = [python or sys.executable, str(WORKER), str(asked), str(answer)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**surroundings, **OFFLINE}
            )
        except subprocess.TimeoutExpired as error:
            raise ErtaError(f"the VBench worker took more than {timeout_s:.0f} s") from error
        except OSError as error:
            raise ErtaError(f"the VBench worker cannot be started: {error.strerror}") from error
        if done.returncode == 0 and answer.is_file():
            return json.loads(answer.read_text())
        lines = (done.stderr or done.stdout).strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode} and no answer"
        if f"[Errno {errno.ENOSPC}]" in last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), scratch)
        raise ErtaError(f"the VBench worker failed: {last}")
