"""A simulated cluster: a sweep as submitit's local jobs, some of which are killed, ends in the table of the serial one."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_dir

from experiments.harness.config import CONF
from tests.commands import QUICK
from tests.soak import ROOT

JOBS = int(os.environ.get("ERTA_CLUSTER_JOBS", 4))  # 20 by hand
KILLED, AT_ONCE = max(2, JOBS // 4), 3
THRESHOLDS = ",".join(f"{0.02 * (k + 1):g}" for k in range(JOBS))
TIMES = ("speed", "_s", "seconds", "calibration", "peak", "headline")  # the headline tells the speed-up too
MOST_TRIES = 12


def start(folder: Path, weights: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "run.py"), "-m", *QUICK, f"model.path={weights}", "bench=fidelity"]
    command += ["bench.num_prompts=2", f"cache.threshold={THRESHOLDS}", "hydra.sweep.dir=sweep", *launcher]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def table(folder: Path) -> list[dict[str, str]]:
    """The sweep's table without what a clock says."""
    with open(folder / "sweep" / "table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if not any(part in key for part in TIMES)} for row in rows]


@pytest.mark.slow
def test_killed_jobs_are_made_again_by_the_same_command(tmp_path, weights):
    """Mutants: a run that a job left unfinished taken for finished; a folder that two jobs share."""
    for name in ("serial", "cluster"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "serial", weights)
    said, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, said
    rng, killed, tries = random.Random(0), 0, 0
    while True:
        tries += 1
        assert tries <= MOST_TRIES
        process = start(
            tmp_path / "cluster",
            weights,
            "hydra/launcher=local",
            f"hydra.sweeper.max_batch_size={AT_ONCE}",
            "wait=true",
        )
        while process.poll() is None and killed < KILLED:
            time.sleep(rng.uniform(3, 15))
            jobs = [one for one in psutil.Process(process.pid).children(recursive=True) if is_job(one)]
            if jobs:
                rng.choice(jobs).send_signal(signal.SIGKILL)
                killed += 1
        said, _ = process.communicate(timeout=1500)
        assert "Traceback" not in said
        if process.returncode == 0:
            break
    assert killed == KILLED and len(table(tmp_path / "cluster")) == JOBS
    assert table(tmp_path / "cluster") == table(tmp_path / "serial")


def is_job(process: psutil.Process) -> bool:
    try:
        return "submitit.core._submit" in process.cmdline()
    except psutil.Error:
        return False


@pytest.mark.parametrize("name", ["slurm", "local", "ray"])
def test_launchers_are_ready_to_be_used(name):
    """Mutant: a key that the launcher does not know."""
    text = (CONF / "hydra" / "launcher" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith({"slurm": "SlurmLauncher", "local": "LocalLauncher", "ray": "RayLauncher"}[name])
    if name == "slurm":
        assert launcher.cpus_per_task == 8 and launcher.array_parallelism == 32
