"""The default job, over and over on small settings, disturbed at random: nothing finished may be lost, no record may differ.

    python -m tests.soak --minutes 60 --out outputs/soak

A round starts the command and disturbs it: a signal (SIGTERM, SIGKILL, Ctrl-C) at a random time, a disk that is full from a random
write on, a second process with the same command, or nothing. The command is given again until its record is there, which must be
that of an undisturbed run, times apart; then the next job begins, every third one without a calibration. Prints its figures as JSON
and exits with 1 if anything was lost, differs, or showed a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOB = (
    "model.num_inference_steps=6",
    "bench=fidelity",
    "bench.num_prompts=4",
    "calibration.num_prompts=2",
    "calibration.window=4",
    "cache.steps=3",
    "wandb.mode=disabled",
)
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL, "Ctrl-C": signal.SIGINT}
FAULTS = (*SIGNALS, "full disk", "two at once", "none")
MOST_WRITES = 60  # of a whole job there are about as many
LONGEST_S = 600.0


class Soak:
    """A working folder, what an undisturbed run gave, and what was counted."""

    def __init__(self, work: Path, job: tuple[str, ...], rng: random.Random) -> None:
        self.work, self.job, self.rng = work, job, rng
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        started = time.monotonic()
        code, said = self.finish(self.start())
        if code != 0:
            raise SystemExit(f"the undisturbed run failed:\n{said}")
        self.usual_s = time.monotonic() - started
        (folder,) = self.folders()
        self.wanted = essence(json.loads((folder / "record.json").read_text()))
        self.rows = {row["index"]: row for row in lines(folder)}
        shutil.rmtree(work / "outputs")

    def start(self, full_after: int | None = None) -> subprocess.Popen[str]:
        """The command, on a disk that is full from a write on if that is asked for."""
        how = [str(ROOT / "run.py")] if full_after is None else ["-m", "tests.faulty", str(full_after)]
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *how, *self.job]
        return subprocess.Popen(
            command, cwd=self.work, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and what was said. A command that hangs is ended, and counts as wrong."""
        try:
            said, _ = process.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            self.wrong.append("a command hung")
        if "Traceback" in said and not said.rstrip().endswith(
            "KeyboardInterrupt"
        ):  # that comes before any code of ours
            self.wrong.append(f"a traceback: {said[max(0, said.index('Traceback') - 300) :][:3000]}")
        return process.returncode, said

    def folders(self) -> list[Path]:
        """All run folders."""
        return sorted(path.parent for path in self.work.glob("outputs/*/*/state.json"))

    def job_once(self, end: float) -> None:
        """One job to its record, disturbed on its way; left as it is if the time, of `time.monotonic`, is over before."""
        if self.counts["jobs"] % 3 == 0:
            shutil.rmtree(self.work / "outputs" / "calibrations", ignore_errors=True)
        while True:
            fault, before = self.rng.choice(FAULTS), self.finished()
            codes = self.disturbed(fault)
            self.faults[fault] += 1
            self.counts["rounds"] += 1
            after = self.finished()
            if not before <= after:
                self.wrong.append(f"{fault}: finished prompts {sorted(before - after)} are lost")
            self.check_rows(fault)
            if self.check_record(fault, codes):
                break
            if self.wrong or time.monotonic() > end:
                return
        self.counts["jobs"] += 1
        for folder in self.folders():
            shutil.rmtree(folder)

    def disturbed(self, fault: str) -> list[int]:
        """Run the command under a fault; its exit codes."""
        if fault == "full disk":
            return [self.finish(self.start(self.rng.randrange(MOST_WRITES)))[0]]
        first = self.start()
        if fault == "two at once":
            time.sleep(self.rng.uniform(0, 0.7 * self.usual_s))
            codes = [self.finish(one)[0] for one in (self.start(), first)]
            self.counts["refused"] += codes[0] == 1
            return codes
        if fault in SIGNALS:
            try:
                first.wait(self.rng.uniform(0, 1.1 * self.usual_s))
            except subprocess.TimeoutExpired:
                first.send_signal(SIGNALS[fault])
                self.counts["killed"] += 1
        return [self.finish(first)[0]]

    def finished(self) -> set[int]:
        """Prompts with a whole line, in any folder."""
        return {row["index"] for folder in self.folders() for row in lines(folder)}

    def check_rows(self, fault: str) -> None:
        for folder in self.folders():
            found = lines(folder)
            if len({row["index"] for row in found}) < len(found):
                self.wrong.append(f"{fault}: a prompt stands twice")
            for row in found:
                self.counts["rows compared"] += 1
                if row != self.rows[row["index"]]:
                    self.wrong.append(f"{fault}: prompt {row['index']} differs")

    def check_record(self, fault: str, codes: list[int]) -> bool:
        """Whether the job is done. A record is right or absent, and a command that ends with 0 has left one."""
        found = [folder / "record.json" for folder in self.folders() if (folder / "record.json").is_file()]
        for path in found:
            self.counts["records compared"] += 1
            if essence(json.loads(path.read_text())) != self.wanted:
                self.wrong.append(f"{fault}: a record differs")
        if 0 in codes and not found:
            self.wrong.append(f"{fault}: exit code 0 and no record")
        return bool(found)

    def figures(self) -> dict[str, Any]:
        """What was counted."""
        return {**self.counts, "faults": dict(self.faults), "usual_s": round(self.usual_s, 1), "wrong": self.wrong}


def essence(value: Any) -> Any:
    """A record or a row without what differs from run to run: times, memory, dates."""
    if isinstance(value, dict):
        left_out = ("timing", "date", "device", "peak_bytes", "command", "overhead_calls")
        return {
            key: essence(one)
            for key, one in value.items()
            if key not in left_out and not key.endswith("_s") and not key.startswith("speedup") and key != "plan_report"
        }
    return [essence(one) for one in value] if isinstance(value, list) else value


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run, times left out; the last one may be torn."""
    path = folder / "per_prompt.jsonl"
    if not path.is_file():
        return []
    text = path.read_bytes().splitlines(keepends=True)
    return [essence(json.loads(line)) for line in text if line.endswith(b"\n")]


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=10**6, help="at most so many jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="for figures.json; none: only printed")
    parser.add_argument("job", nargs="*", default=list(JOB), help="what is typed after python run.py")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as work:
        soak = Soak(Path(work) / "work", tuple(given.job), random.Random(given.seed))
        while time.monotonic() < end and soak.counts["jobs"] < given.jobs and not soak.wrong:
            soak.job_once(end)
    figures = json.dumps(soak.figures(), indent=1)
    print(figures)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "figures.json").write_text(figures + "\n", encoding="utf-8")
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
