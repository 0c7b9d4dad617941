"""Several commands as one: each runs as it would by itself, in a folder below, with one bar for all and what is done kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from analysis import records, tables, verdicts
from analysis.comparison import results_of
from erta.errors import ErtaError
from experiments.harness.config import CONF
from experiments.output import console
from experiments.output.files import read_object, write_json
from experiments.output.run_folder import STATE_FILE, config_hash, goes_on, mark_finished

LOG, TIMES, RESULTS = "log.txt", "times.json", "results.md"
NEARLY = 0.97  # of a command's bar, as long as it is not finished
LAST_LINES = 5
PROMPTS = "bench.num_prompts"


@dataclass(frozen=True)
class Member:
    """A command.

    Attributes:
        name: of its folder.
        overrides: what is typed after `python run.py`.
        minutes: what it is expected to take, for the time left; replaced by what it took as soon as that is known.
    """

    name: str
    overrides: tuple[str, ...]
    minutes: float = 10.0

    @property
    def command(self) -> str:
        return " ".join(["python run.py", *self.overrides])


def run_members(cfg: DictConfig, folder: Path, members: list[Member]) -> None:
    """Run what is not done yet, one after the other; write `results.md` with all verdicts, print them.

    A command that is done is not run again while its configuration is the same (`resume=false` runs all). One that fails does
    not keep the others from running.

    Raises ErtaError at the end for commands that failed, by name and with their last line.
    """
    _check(members)
    times = read_object(folder / TIMES)
    expected = {one.name: times.get(one.name, 60 * one.minutes) for one in members}
    todo = [one for one in members if not (goes_on(cfg) and _is_done(folder / one.name, one))]
    for one in members:
        if one not in todo:
            console.note(f"done already: {one.name}")
    failed = {}
    with _bar() as bar:
        task = bar.add_task("", total=sum(expected[one.name] for one in todo), visible=bool(todo), left="")
        for place, one in enumerate(todo):
            before = sum(expected[earlier.name] for earlier in todo[:place])

            def show(seconds: float, doing: str, one: Member = one, before: float = before, place: int = place) -> None:
                share = min(seconds / expected[one.name], NEARLY)
                text = f"{place + 1} of {len(todo)}: {one.name}{f' ({doing})' if doing else ''}"
                done = before + share * expected[one.name]
                bar.update(
                    task, completed=done, description=text, left=_clock(sum(expected[m.name] for m in todo) - done)
                )

            started = time.perf_counter()
            reason = _run(one, folder / one.name, cfg, show)
            if reason is None:
                times[one.name] = time.perf_counter() - started
                write_json(folder / TIMES, times)
            else:
                failed[one.name] = reason
                console.note(f"{one.name} failed: {reason}")
            bar.update(task, completed=before + expected[one.name])
    _show_results(folder, members)
    if failed:
        named = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise ErtaError(f"failed: {named}. The others are in {folder}; the same command tries these again.")
    mark_finished(folder)


def chosen(members: list[Member], own: DictConfig, key: str) -> list[Member]:
    """The members that the experiment's own keys ask for, with as many prompts as they say.

    Raises ErtaError for a name that does not exist.
    """
    names = [one.name for one in members]
    if unknown := [name for name in own.only if name not in names]:
        raise ErtaError(f"{key}.only: there is no {', '.join(unknown)}. Choose from {', '.join(names)}")
    asked = [one for one in members if not own.only or one.name in own.only]
    if own.num_prompts is None:
        return asked
    count = (f"{PROMPTS}={own.num_prompts}",)
    return [
        replace(one, overrides=(*(part for part in one.overrides if not part.startswith(PROMPTS)), *count))
        for one in asked
    ]


def _bar() -> Progress:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    ]
    return Progress(*columns, TextColumn("left: {task.fields[left]}"), console=console.out)


def _clock(seconds: float) -> str:
    """Minutes, from what the commands are expected to take."""
    return f"{max(1, round(seconds / 60))} min"


def _check(members: list[Member]) -> None:
    """Compose every command before the first one runs."""
    for one in members:
        _composed(one)


def _composed(member: Member) -> DictConfig:
    return compose("config", overrides=list(member.overrides))


def _is_done(folder: Path, member: Member) -> bool:
    state = read_object(folder / STATE_FILE)
    return bool(state.get("finished")) and state.get("config_hash") == config_hash(_composed(member))


def _run(member: Member, folder: Path, cfg: DictConfig, show: Any) -> str | None:
    """Run a command to its end, its output in its folder's log; the reason if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    rest = [f"hydra.run.dir={folder}", f"wandb.mode={cfg.wandb.mode}", f"wandb.project={cfg.wandb.project}"]
    resume = [f"resume={str(cfg.resume).lower()}", "wait=true"]  # its last process may still be on its way out
    command = [sys.executable, str(CONF.parent / "run.py"), *member.overrides, *rest, *resume]
    environment = {**os.environ, console.PROGRESS_FILE: str(progress), console.PARENT: str(os.getpid())}
    with open(folder / LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {member.command}\n")
        log.flush()
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                show(time.monotonic() - started, _doing(progress))
                time.sleep(console.LOOK_EVERY_S)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    progress.unlink(missing_ok=True)
    return None if process.returncode == 0 else _last_error(folder / LOG, process.returncode)


def _doing(progress: Path) -> str:
    found = read_object(progress)
    if not found.get("description"):
        return ""
    total = found.get("total")
    return f"{found['description']}, {found['completed']:g}{f' of {total:g}' if total else ''}"


def _last_error(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-LAST_LINES:] if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"exit code {code}; see {log}"


def _show_results(folder: Path, members: list[Member]) -> None:
    """All claims of all commands with their verdicts, as `results.md` and, counted, on the terminal."""
    text, counts = [f"# {folder.name}"], []
    for one in members:
        said = _results(folder / one.name)
        if not said:
            continue
        text += [f"## {one.name}", f"`{one.command}`", tables.markdown(verdicts.HEADINGS, [r.cells() for r in said])]
        found = Counter(r.verdict for r in said)
        counts.append([one.name, *(found[name] for name in verdicts.VERDICTS), folder / one.name / tables.TABLE])
    if counts:
        (folder / RESULTS).write_text("\n\n".join(text) + "\n", encoding="utf-8")
        console.table("claims", ["", *verdicts.VERDICTS, "table"], counts)
        console.note(f"written: {folder / RESULTS}")


def _results(folder: Path) -> list[verdicts.Result]:
    """What a command's record says of its claims; nothing if it has none, or is no table or figure."""
    try:
        made = records.read_table(folder)
    except records.RecordError:
        return []
    return results_of(made)
