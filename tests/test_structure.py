"""The shape of the project: imports run one way, environments agree, every config loads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_method
from packaging.requirements import Requirement

from experiments import cli
from experiments.harness import config

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"erta": {"erta"}, "analysis": {"analysis"}, "experiments": {"erta", "analysis", "experiments"}}
NOT_IN = {
    "erta": {"hydra", "omegaconf", "wandb", "rich", "matplotlib", "pandas", "torchmetrics"},
    "analysis": {"torch", "diffusers", "hydra", "omegaconf"},
    "experiments": set(),
}
# The rooms of `experiments`, each of which knows only rooms above it; the commands know all of them.
ROOMS = ["scenes", "prompts", "output", "models", "bench", "harness", "methods", "training"]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    ours = {"erta", "experiments", "analysis", "tests", "run"}
    for path in files:
        tops = {name.split(".")[0] for name in imported(path)}
        assert not (tops & ours) - MAY_IMPORT[package], path
        assert not tops & NOT_IN[package], path
    assert files


def room_of(name: str) -> str | None:
    """The room of `experiments` in which a module lies; None for a command, or another package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "experiments" and len(parts) > 2 and parts[1] in ROOMS else None


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_those_above(room):
    """No circles between sub-packages, and no room knows a command. Mutant: harness imports a method."""
    for path in (ROOT / "experiments" / room).rglob("*.py"):
        names = [name for name in imported(path) if name.startswith("experiments.")]
        known = {room_of(name) for name in names} - {room}
        assert known <= set(ROOMS[: ROOMS.index(room)]), (path, known)


def test_every_room_and_command_is_known():
    """One rule: `experiment=X` is experiments/X.py and conf/experiment/X.yaml, and its own keys are X.key."""
    folder = ROOT / "experiments"
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)
    commands = {path.stem for path in folder.glob("*.py")} - {"__init__", "cli"}
    assert commands == set(choices("experiment"))
    for name in commands:
        about = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())
        assert about["experiment"]["name"] == name and about["experiment"]["_target_"] == f"experiments.{name}.run"
        own = set(about) - {"experiment", "defaults", "bench", "calibration", "hydra"}
        assert own <= {name} and (name in own) <= any(
            f"/keys@{name}" in str(entry) for entry in about.get("defaults", [])
        )


def test_files_are_short_enough_to_read():
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    entries = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {entry.name.lower().replace("_", "-"): entry for entry in entries}


def test_lock_holds_exact_versions_inside_the_ranges():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = locked()
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["run"],
        *project["optional-dependencies"]["notebooks"],
        *project["optional-dependencies"]["dev"],
    ]
    for text in wanted:
        requirement = Requirement(text)
        pin = pins[requirement.name.lower().replace("_", "-")]
        version = next(iter(pin.specifier)).version
        assert str(pin.specifier).startswith("==") and requirement.specifier.contains(version), (text, str(pin))


def test_conda_environment_is_the_same_set():
    data = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert data["name"] == "erta" and data["channels"] == ["conda-forge"]
    plain = [entry for entry in data["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in data["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    for entry in plain:
        Requirement(entry.replace("=", "==", 1) if "=" in entry else entry)
    assert "vbench" not in locked()


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [f"{group}={name}" for group in ("model", "sampler", "cache", "bench", "experiment") for name in choices(group)],
)
def test_every_choice_composes_and_its_target_exists(override):
    assert cli.CONF == ROOT / "conf"
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", overrides=[override])
    config.validate(cfg)
    assert callable(get_method(cfg.cache._target_)) and callable(get_method(cfg.experiment._target_))
    group, name = override.split("=")
    first = (ROOT / "conf" / group / f"{name}.yaml").read_text()
    assert "# " in first, "every choice says in its first comment what it is"
    if group != "experiment":
        assert cfg[group].name == name


def test_no_registry_hosts_or_machine_paths():
    for path in [ROOT / "requirements.lock", ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]:
        text = path.read_text()
        assert "index-url" not in text and "/root" not in text and "file://" not in text, path
