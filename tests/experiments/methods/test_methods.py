"""Every method through the command line, and described; and how to add one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method

import experiments.methods
from erta.online import online
from experiments.harness import catalogue
from experiments.methods.easycache import EasyCache
from experiments.output.files import read_lines
from tests.commands import folders
from tests.pipelines import FLUX_CALL, build_flux, generate

MODULE_METHODS = {"fora": 5, "smoothcache": 4, "t_gate": 5, "delta_dit": 4}


@pytest.mark.slow
@pytest.mark.parametrize("cache", MODULE_METHODS)
def test_module_methods_in_the_harness(command, tmp_path, cache):
    """Through the command line: not more than the budget, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", f"cache.steps={MODULE_METHODS[cache]}")
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    assert record["plan_report"]["computed"] <= MODULE_METHODS[cache] + 0.5
    made = [row["cached"]["forwards"] for row in rows]
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and max(made) < 12
    assert record["steps"]["without_reuse"] == 0 and record["memory"]["cache_bytes"] > 0


RULES = {"dicache": ["cache.steps=5"], "sencache": ["cache.steps=4", "cache.options.first=10"]}


@pytest.mark.slow
@pytest.mark.parametrize("cache", RULES)
def test_rules_in_the_harness(command, tmp_path, cache):
    """Through the command line: the budget is met on calibration prompts, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", *RULES[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record, rows = json.loads((folder / "record.json").read_text()), read_lines(folder / "per_prompt.jsonl")
    report = record["plan_report"]
    assert report["computed"] <= report["asked"] + 0.5 and f"{cache}: {report['knob']}=" in printed
    made = [row["cached"]["forwards"] for row in rows]
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and max(made) < 12
    assert record["steps"]["without_reuse"] == 0 and record["memory"]["cache_bytes"] > 0


SEARCHED = {"gcache": ["cache.options.trials=2"], "lemica": [], "budcache": ["cache.options.iterations=3"]}


@pytest.mark.slow
@pytest.mark.parametrize("cache", SEARCHED)
def test_searched_methods_in_the_harness(command, tmp_path, cache):
    """Exactly the budget, as a plan, whose file is written."""
    code, printed = command(f"cache={cache}", "bench=fidelity", "cache.steps=3", *SEARCHED[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    assert record["steps"]["computed"] == 3 == sum(plan["steps"]["mask"]) and record["timing"]["forwards"] == 6
    assert plan["report"]["policy"] == cache and record["metrics"]["psnr_db"] > 0


README = Path(experiments.methods.__file__).with_name("README.md")


@pytest.mark.slow
def test_how_to_add_a_method_as_the_readme_says(command, tmp_path, monkeypatch):
    """The two files of the README, in a temporary folder, and nothing else."""
    section = README.read_text().split("## How to add a method")[1].split("\n## ")[0]
    code, config = (block.split("```")[0] for block in re.split(r"```(?:python|yaml)\n", section)[1:3])
    (tmp_path / "new" / "cache").mkdir(parents=True)
    (tmp_path / "new" / "every_nth.py").write_text(code)
    (tmp_path / "new" / "cache" / "every_nth.yaml").write_text(config)
    monkeypatch.setattr(experiments.methods, "__path__", [*experiments.methods.__path__, str(tmp_path / "new")])
    status, printed = command(
        "cache=every_nth", "bench=fidelity", "cache.steps=3", f"hydra.searchpath=[file://{tmp_path / 'new'}]"
    )
    assert status == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    assert record["steps"]["computed"] == 3 and record["steps"]["mask"] == [1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", [name for name in catalogue.names() if catalogue.facts(name).has_budget])
def test_every_method_is_described(name):
    """Site, what it stores, static or online, the paper, where ours deviates. Mutant: any of the five left out."""
    made = get_method(catalogue.configuration(name)._target_)
    text = " ".join(f"{made.__doc__} {sys.modules[made.__module__].__doc__}".split())
    missing = [what for what, pattern in DESCRIBED.items() if not re.search(pattern, text)]
    assert not missing, f"{made.__module__}.{made.__name__}: {missing}"


DESCRIBED = {
    "site": r"Site: ",
    "stored": r"Stored(:| in each guidance branch:)",
    "static or online": r"Static|[Oo]nline",
    "paper": r"arXiv \d{4}\.\d{5}|\(\w+, [\w-]+/\w+\)|(baseline|method) of ours|cache-dit",
    "deviations": r"Where we differ:",
}


def test_online_on_a_model_with_one_forward_a_step():
    """FLUX: packed tokens, no second branch."""
    pipe = build_flux()
    before = generate(pipe, FLUX_CALL)
    with online(pipe, EasyCache(0.6, warmup=2)) as trace:
        cached = generate(pipe, FLUX_CALL)
    assert 3 <= trace.forwards["cond"] < 6 and list(trace.forwards) == ["cond"]
    assert 0 < (cached - before).abs().mean() < before.abs().mean()
    assert torch.equal(generate(pipe, FLUX_CALL), before)


METHODS = {
    "easycache": ["cache.steps=4", "cache.options.warmup=2"],
    "teacache": ["cache.steps=4"],
    "magcache": ["cache.steps=4"],
    "first_block": ["cache.steps=5"],
    "taylorseer": ["cache.steps=4", "cache.options.warmup=1"],
    "magcache_diffusers": ["cache.steps=5"],
    "seacache": ["cache.steps=4"],
    "meancache": ["cache.steps=4"],
    "fastercache": ["cache.options.spatial=2"],
    "pab": ["cache.options.window=[0,1]", "cache.options.spatial=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("cache", METHODS)
def test_methods_in_the_harness(command, tmp_path, cache):
    """Through the command line: the budget is met on calibration prompts, and the record tells what was made."""
    code, printed = command(f"cache={cache}", "bench=fidelity", *METHODS[cache])
    assert code == 0, printed
    (folder,) = folders(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    report, rows = record["plan_report"], read_lines(folder / "per_prompt.jsonl")
    if "asked" in report:
        assert f"cache.steps={report['asked']}" in METHODS[cache] and report["computed"] <= report["asked"] + 0.5
        assert f"{cache}: {report['knob']}=" in printed
    made = [row["cached"]["forwards"] for row in rows]
    assert record["timing"]["forwards"] == pytest.approx(sum(made) / 3) and max(made) < 12
    assert record["steps"]["computed"] == pytest.approx(sum(made) / 6) and record["steps"]["total"] == 6
    assert record["steps"]["mask"] == rows[0]["cached"]["mask"] and record["steps"]["without_reuse"] == 0
    assert record["metrics"]["psnr_db"] > 0 and record["memory"]["cache_bytes"] > 0
    assert (folder / "figures" / "step_map.png").stat().st_size > 5000
