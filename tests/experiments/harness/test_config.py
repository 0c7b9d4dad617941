"""Settings that nobody reads are refused; an experiment's own keys are there with that experiment alone."""

from __future__ import annotations

from dataclasses import fields

import pytest

from erta import PlanOptions
from erta.errors import ErtaError
from experiments.harness import config
from tests import commands

ACCEPTED = {
    "main": [
        "cache.steps=3",
        "bench=vbench",
        "calibration.path=x",
        "model.dtype=bfloat16",
        "seed=1",
        "wandb.mode=disabled",
    ],
    "compare": [
        "compare.quick=true",
        "bench.num_prompts=2",
        "calibration.num_prompts=2",
        "bench=fidelity",
        "resume=false",
    ],
    "budgets": ["budgets.workers=1", "bench.frames_from=mp4"],
    "table3_ablation": ["table3_ablation.seeds=1", "sampler=unipc"],
    "calibrate": ["calibration.shard=1/2", "cache.site=blocks"],
    "model_card": ["model=flux_dev", "calibration.window=4"],
    "speed": ["speed.pairs=1", "cache.speedup=2"],
    "train_tiny": ["train_tiny.steps=1", "model=flux_tiny"],
    "decomposition": ["cache=policy", "decomposition.growth_prompts=1"],
}
REFUSED = {
    ("main", "calibration.shard=1/2"): "are for experiment=calibrate",
    ("compare", "cache=uniform"): "the rows of this table decide about the cache",
    ("compare", "bench=vbench"): "does not evaluate bench=vbench: it takes bench=fidelity",
    ("compare", "bench.dimensions=all"): "bench.dimensions=all: experiment=compare does not read it",
    ("budgets", "calibration.path=x"): "may need several calibrations",
    ("calibrate", "bench.num_prompts=4"): "experiment=calibrate does not read it",
    ("calibrate", "cache.threshold=0.1"): "experiment=calibrate does not read it",
    ("model_card", "cache.steps=3"): "experiment=model_card does not read it",
    ("model_card", "sampler=unipc"): "experiment=model_card does not read it",
    ("speed", "bench=fid_clip"): "experiment=speed does not read it",
}


@pytest.mark.parametrize("experiment", ACCEPTED)
def test_what_an_experiment_reads_is_accepted(experiment):
    overrides = [f"experiment={experiment}", *ACCEPTED[experiment]]
    cfg = commands.config(*overrides)
    assert config.check_is_read(cfg, overrides) is None and cfg.experiment.name == experiment


@pytest.mark.parametrize(("experiment", "override"), REFUSED)
def test_what_it_does_not_read_is_refused(experiment, override):
    """Mutants: a key let through because its group has another one that is read; the bench looked at nowhere."""
    overrides = [f"experiment={experiment}", override]
    with pytest.raises(ErtaError, match=REFUSED[experiment, override]):
        config.check_is_read(commands.config(*overrides), overrides)


def test_own_keys_are_the_experiments(command):
    """Mutant: the keys of all experiments in every configuration."""
    assert "compare" not in commands.config() and commands.config("experiment=compare").compare.quick is False
    code, printed = command("compare.quick=true")
    assert code == 1 and "compare.quick is read by experiment=compare only" in printed
    code, printed = command("experiment=budgets", "budgets.wokers=1")
    assert code == 1 and "unknown key budgets.wokers" in printed
    code, printed = command("experiment=train_tiny", "experiment.batch_size=3")
    assert code == 1 and "did you mean train_tiny.batch_size?" in printed
    code, printed = command("experiment=compare", "compare.workers=0")
    assert code == 1 and "compare.workers must be at least 1, not 0" in printed


def test_folders_say_which_experiment_it_was():
    """Mutant: every folder named after cache and bench, whether they were read or not."""
    names = {name: commands.config(f"experiment={name}").experiment.folder for name in ACCEPTED}
    assert names["main"] == "wan21_tiny_ertacache_vbench" and names["compare"] == "compare_wan21_tiny"
    assert names["decomposition"] == "decomposition_wan21_tiny_ertacache"
    assert all(folder.startswith(name) for name, folder in names.items() if name != "main")


def test_plan_options_are_keys_of_the_cache():
    """Mutant: a list of options of its own, which forgets the next one."""
    cache = commands.config("cache=ertacache").cache
    assert {option.name: cache[option.name] for option in fields(PlanOptions)} == vars(PlanOptions())
    assert (
        not commands.config("cache=policy").cache.adjust_time and not commands.config("cache=policy_time").cache.rectify
    )


def test_what_does_not_decide_the_result_is_not_hashed():
    """Mutants: a method's title hashed, so that unfinished runs are lost; the experiment's name, or a budget, not."""
    from experiments.output.run_folder import config_hash

    plain = commands.config("experiment=compare")
    other = commands.config("experiment=compare", "compare.workers=2", "resume=false", "wandb.mode=disabled")
    other.cache.about.title = "another"
    assert config_hash(plain) == config_hash(other)
    seen = {config_hash(plain), config_hash(commands.config("experiment=compare", "compare.quick=true"))}
    seen |= {config_hash(commands.config("experiment=budgets", "bench.num_prompts=64")), config_hash(commands.config())}
    assert len(seen) == 4


def test_a_group_is_no_value(command):
    """Mutant: a raw error about an attribute of a string, or a seed that is none."""
    for override, said in {
        "wandb=disabled": "wandb is a group of keys",
        "calibration=x": "calibration is a group of keys",
    }.items():
        code, printed = command(override)
        assert code == 1 and said in printed and "Error" not in printed, printed
    code, printed = command("seed=null")
    assert code == 1 and "seed" in printed and "Traceback" not in printed
