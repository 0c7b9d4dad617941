"""Several commands as one: what is done stays, what fails is named, the others go on, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from erta.errors import ErtaError
from experiments import all_paper, all_tiny
from experiments.harness import members
from experiments.harness.config import CONF
from experiments.harness.members import Member, chosen, run_members
from experiments.output import console
from experiments.output.files import write_json
from experiments.output.run_folder import STATE_FILE, config_hash
from tests.commands import QUICK

MINE = [Member("one", ("experiment=model_card",)), Member("two", ("experiment=model_card", "model=flux_tiny"))]
CFG = OmegaConf.create({"resume": True, "wandb": {"mode": "disabled", "project": "p"}})


@pytest.fixture
def ran(monkeypatch):
    """Which commands ran; a name in `fails` fails, the others leave a finished folder."""
    names, fails = [], set()

    def run(member, folder, cfg, show):
        names.append(member.name)
        if member.name in fails:
            return "no weights"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_FILE, {"config_hash": config_hash(members._composed(member)), "finished": True})
        return None

    monkeypatch.setattr(members, "_run", run)
    with initialize_config_dir(str(CONF), version_base=None):
        yield names, fails


def test_what_is_done_is_not_run_again(ran, tmp_path):
    """Mutants: a folder of another configuration taken for done; `resume=false` that does nothing."""
    names, _ = ran
    (tmp_path / "state.json").write_text("{}")
    run_members(CFG, tmp_path, MINE)
    run_members(CFG, tmp_path, MINE)
    assert names == ["one", "two"] and json.loads((tmp_path / "state.json").read_text())["finished"]
    run_members(CFG, tmp_path, [MINE[0], Member("two", ("experiment=model_card", "model=wan21_tiny"))])
    assert names == ["one", "two", "two"]
    run_members(OmegaConf.merge(CFG, {"resume": False}), tmp_path, MINE)
    assert names[3:] == ["one", "two"]


def test_a_failure_is_named_and_the_others_go_on(ran, tmp_path):
    """Mutants: it stops the others; it is forgotten; it counts as done."""
    names, fails = ran
    fails.add("one")
    with pytest.raises(ErtaError, match=r"failed: one \(no weights\)"):
        run_members(CFG, tmp_path, MINE)
    fails.clear()
    run_members(CFG, tmp_path, MINE)
    assert names == ["one", "two", "one"]


def test_only_some_are_asked_for_and_fewer_prompts():
    """Mutants: a command's own number of prompts beside the one asked for; a name that does not exist passed over."""

    def own(**changes):
        return OmegaConf.create({"only": [], "num_prompts": None, **changes})

    assert [one.name for one in chosen(MINE, own(only=["two"]), "k")] == ["two"] and chosen(MINE, own(), "k") == MINE
    (few,) = chosen([Member("a", ("experiment=pareto", "bench.num_prompts=16"))], own(num_prompts=4), "k")
    assert few.overrides == ("experiment=pareto", "bench.num_prompts=4")
    with pytest.raises(ErtaError, match=r"k\.only: there is no three\. Choose from one, two"):
        chosen(MINE, own(only=["three"]), "k")


@pytest.mark.slow
def test_the_same_list_on_the_papers_models():
    """Every command composes; on one model those of its kind. Mutants: a quick comparison; images on a video model."""
    own = all_paper.members(None, 81)
    assert [one.name for one in own] == [one.name.replace("_quick", "") for one in all_tiny.MEMBERS]
    assert not any("tiny" in part or "quick" in part for one in own for part in one.overrides)
    on_hunyuan = all_paper.members("hunyuan_video", 129)
    assert {part for one in on_hunyuan for part in one.overrides if part.startswith("model=")} == {
        "model=hunyuan_video"
    }
    assert not any("images" in one.name or one.name == "table2_image" for one in on_hunyuan)
    assert [one.name for one in all_paper.members("flux_dev", None)][-1] == "compare_images"
    with initialize_config_dir(str(CONF), version_base=None):
        for one in (*all_tiny.MEMBERS, *own):
            assert members._composed(one).experiment.name == one.overrides[0].split("=")[1]


def test_a_command_says_how_far_it_is(tmp_path, monkeypatch):
    """Mutant: a bar that says nothing to the command that runs it."""
    path = tmp_path / "progress.json"
    monkeypatch.setenv(console.PROGRESS_FILE, str(path))
    with console.progress_bar() as bar:
        bar.advance(bar.add_task("rows", total=4))
    assert json.loads(path.read_text()) == {"description": "rows", "completed": 1, "total": 4}
    assert members._doing(path) == "rows, 1 of 4" and members._doing(tmp_path / "nothing") == ""
    monkeypatch.setenv(console.PROGRESS_FILE, str(tmp_path / "gone" / "progress.json"))
    with console.progress_bar() as bar:  # mutant: a file that cannot be written ends the command
        bar.advance(bar.add_task("rows", total=4))
    monkeypatch.setattr(console.out, "quiet", False)
    console.quiet_process()  # as a process that works for the command does
    assert type(console.progress_bar()).__name__ == "Progress"


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_ends_the_same(tmp_path, weights):
    """kill -9, then the same command: the finished part is not run again, and the other goes on from where it was.

    Mutants: the killed command's child lives on; rows made twice.
    """
    quick = [part for part in QUICK if not part.startswith(("wandb", "bench.num"))]
    script = tmp_path / "run.py"
    overrides = [*quick, f"model.path={weights}", "bench.num_prompts=4"]
    script.write_text(
        f"import sys; sys.path.insert(0, {str(CONF.parent)!r})\n"
        "from experiments import all_tiny, cli\nfrom experiments.harness.members import Member\n"
        f"all_tiny.MEMBERS[:] = [Member(n, (f'experiment={{n}}', *{overrides!r})) for n in ('fig2b_trajectory_drift', 'fig4_ablation_samples')]\n"
        "cli.main()\n"
    )

    def command(folder: str) -> list[str]:
        return [sys.executable, str(script), "experiment=all_tiny", f"hydra.run.dir={folder}", "wandb.mode=disabled"]

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(str(killed)), cwd=tmp_path, stdout=subprocess.DEVNULL)
    rows = killed / "fig4_ablation_samples" / "rows.jsonl"
    deadline = time.monotonic() + 600
    while not rows.is_file() or len(rows.read_text().splitlines()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(3)
    before = rows.read_text()
    time.sleep(1)
    assert rows.read_text() == before  # the child is gone too
    done = subprocess.run(command(str(killed)), check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "done already: fig2b_trajectory_drift" in done.stdout
    found = rows.read_text().splitlines()
    made = [(line["row"], line["index"]) for line in map(json.loads, found)]
    whole = before[: before.rfind("\n")].splitlines()
    assert len(whole) >= 3 and set(whole) <= set(found) and len(made) == len(set(made)) == 4 * 4
    again = subprocess.run(command(str(killed)), check=True, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.count("done already") == 2


def test_given_again_a_list_does_nothing_and_a_part_of_it_belongs_to_it(command, monkeypatch):
    """In the folder of its name, without being told. Mutants: a second folder beside it; a part taken for another run."""
    names = []

    def run(member, folder, cfg, show):
        names.append(member.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STATE_FILE, {"config_hash": config_hash(members._composed(member)), "finished": True})

    monkeypatch.setattr(members, "_run", run)
    monkeypatch.setattr(all_tiny, "MEMBERS", MINE)
    for part, ran, done in (("[two]", ["two"], 0), ("[]", ["two", "one"], 1), ("[]", ["two", "one"], 2)):
        code, printed = command("experiment=all_tiny", f"all_tiny.only={part}", "wandb.mode=disabled", quick=False)
        assert code == 0 and names == ran and printed.count("done already") == done, printed
    assert [path.name for path in Path("outputs").iterdir()] == ["all_tiny"]
    code, printed = command("experiment=all_tiny", "all_tiny.num_prompts=2", "wandb.mode=disabled", quick=False)
    assert code == 1 and "outputs/all_tiny holds another run: choose another folder" in printed
