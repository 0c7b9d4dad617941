"""Shared fixtures: a tiny random pipeline, its calibrations, and `run.py` with arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline
from hydra.core.global_hydra import GlobalHydra

import erta
from experiments import cli
from tests.browser import CHROMIUM, FLAGS
from tests.commands import QUICK
from tests.pipelines import CALL, PROMPTS, SOLVERS, build_pipe


@pytest.fixture
def pipe() -> WanPipeline:
    return build_pipe()


@pytest.fixture(scope="session")
def calibrations():
    """Calibrations of the tiny pipeline, by solver."""
    return {name: erta.calibrate(build_pipe(name), PROMPTS, window=6, **CALL) for name in SOLVERS}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "pipe"
    build_pipe().save_pretrained(folder)
    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, weights):
    """Run `run.py` with arguments in an empty folder: (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, quick: bool = True) -> tuple[int, str]:
        unread = "bench." if "experiment=calibrate" in arguments else "-"  # it refuses what it does not read
        given = [key for key in [*QUICK, f"model.path={weights}"] if not key.startswith(unread)] if quick else []
        flags = [argument for argument in arguments if argument == "-m"]  # Hydra wants them before the overrides
        overrides = [argument for argument in arguments if argument != "-m"]
        monkeypatch.setattr(sys, "argv", ["run.py", *flags, *given, *overrides])
        GlobalHydra.instance().clear()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium with a profile of its own; tests that need one are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
