"""`experiment=realism`: how much like a real model this one is, by what errors do to it.

Conclusions about caches depend on how hard the model is. On a real one half the steps cost 16 dB against the uncached run; where
they leave 50 dB, nothing much can go wrong. Three measures:

- what fewer steps cost, at a half and a third of them;
- how much a small error has grown at the end, random or along the trajectory, put in at 0, 1/4, 1/2 and 3/4 of the steps, under
  Euler's rule, which carries the whole of it on (`erta.propagation_gain`);
- which of the printed pairs of methods stand as printed, for the paper's model with the same pipeline, at the same share of
  steps. Numbers of one table alone are compared with each other.

`series.fewer`, `series.growth`: by prompt. `series.order`: by level, each method's printed PSNR and ours by prompt. The claims
are the pairs.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

import erta
from analysis import paper
from analysis.comparison import IDENTICAL_DB
from analysis.records import Measured
from experiments.bench.fidelity import psnr_db
from experiments.harness import config
from experiments.harness.arm import Arm, make_arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.printed import share_of
from experiments.harness.rows import Row, compose_row
from experiments.harness.setup import Setup
from experiments.methods.fewer_steps import running_under
from experiments.output import console
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs
from experiments.prompts.choose import Prompt, test_prompts

FEWER = {"1/2": 2, "1/3": 3}
PLACES = {"0": 0.0, "1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
TABLES = ("table1_video", "table2_image")
ABLATION = {"uniform": "uniform", "policy": "policy", "policy + time": "policy_time", "all three": "ertacache"}


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure every prompt; write `rows.jsonl`, the figure, `table.md` with the pairs and `record.json`, print the figures."""
    prompts, setup = test_prompts(cfg), Setup(cfg)
    total = cfg.model.num_inference_steps
    order = printed_order(cfg)
    rows = {
        (level, title): Row(title, one["method"], (), one["computed"])
        for level, found in order.items()
        for title, one in found.items()
    }
    arms = {key: make_arm(setup.with_cache(compose_row(row))) for key, row in rows.items()}
    fewer = {name: Arm(None, {**setup.kwargs, "num_inference_steps": round(total / by)}) for name, by in FEWER.items()}
    check_inputs(folder, describe_inputs(setup.pipe, prompts, next(iter(arms.values())).calibration if arms else None))

    def measure(prompt: Prompt) -> dict[str, Any]:
        uncached = Arm(None, setup.kwargs).sample(setup.pipe, prompt).frames

        def fidelity(arm: Arm) -> float:
            found = psnr_db(uncached, arm.sample(setup.pipe, prompt).frames)
            return IDENTICAL_DB if found is None else found

        line = {
            "fewer": {name: fidelity(arm) for name, arm in fewer.items()},
            "order": [fidelity(arm) for arm in arms.values()],
        }
        with running_under(setup, "flow_match_euler"):
            line["growth"] = growth(setup, prompt)
        return line

    lines = by_prompt("realism", prompts, measure, folder / "rows.jsonl")
    for place, (level, title) in enumerate(rows):
        order[level][title]["psnr_db"] = rounded([line["order"][place] for line in lines])
    series = {
        "fewer": {name: rounded([line["fewer"][name] for line in lines]) for name in FEWER},
        "growth": {
            kind: {name: rounded([line["growth"][kind][name] for line in lines]) for name in PLACES}
            for kind in ("random", "along")
        },
        "order": order,
        "printed_fewer": paper.fewer_steps(printed_model(cfg)),
    }
    claims = pairs(order)
    _show(cfg, series)
    finish_figure(cfg, folder, prompts, series, claims)


def growth(setup: Setup, prompt: Prompt) -> dict[str, dict[str, float]]:
    """By kind of error and place, how much it has grown at the end; one random direction a prompt and place."""
    total = setup.cfg.model.num_inference_steps
    after = [round(share * total) - 1 for share in PLACES.values()]
    found = {}
    for kind in ("random", "along"):
        gains = erta.propagation_gain(
            setup.pipe, prompt.text, after, seed=prompt.seed, along=kind == "along", **setup.kwargs
        )
        found[kind] = dict(zip(PLACES, gains[:, 0].tolist(), strict=True))
    return found


def printed_model(cfg: DictConfig) -> str | None:
    """The printed model whose pipeline this model has, as `paper_tables.yaml` names it; None if there is none."""
    for name in TABLES:
        for block in paper.table(name).blocks:
            if block.model is not None and _pipeline(block.model) == cfg.model.pipeline:
                return block.printed
    return None


def printed_order(cfg: DictConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """By level, methods with their printed PSNR and the number of steps that is the same share of this model's."""
    total = cfg.model.num_inference_steps
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in TABLES:
        for block in paper.table(name).blocks:
            if block.printed != printed_model(cfg):
                continue
            for row in block.rows:
                if row.method is not None and row.psnr_db is not None:
                    one = {"method": row.method, "printed": row.psnr_db, "computed": share_of(block, row, total)}
                    found.setdefault(f"{block.title}, {row.level}", {})[row.title] = one
    ablation = paper.data()["table3_ablation"]
    if printed_model(cfg) == "wan21_1_3b":
        found[ablation["title"]] = {
            title: {"method": method, "printed": ablation["rows"][title]["psnr_db"], "computed": round(total / 2)}
            for title, method in ABLATION.items()
        }
    return {level: rows for level, rows in found.items() if len(rows) > 1}


def pairs(order: dict[str, dict[str, dict[str, Any]]]) -> list[Measured]:
    """A claim for each printed pair of a level: the one that is printed as closer is closer."""
    return [
        Measured(
            text=f"{level}: {better} is closer to the uncached samples than {worse}",
            paper=f"{one['printed']:.2f} against {other['printed']:.2f} dB",
            ours=f"{np.mean(one['psnr_db']):.2f} against {np.mean(other['psnr_db']):.2f} dB",
            values=rounded((np.array(one["psnr_db"]) - np.array(other["psnr_db"])).tolist()),
            unit="dB",
        )
        for level, rows in order.items()
        for (better, one), (worse, other) in permutations(rows.items(), 2)
        if one["printed"] > other["printed"]
    ]


def _pipeline(model: str) -> str:
    return OmegaConf.load(config.CONF / "model" / f"{model}.yaml").pipeline


def _show(cfg: DictConfig, series: dict[str, Any]) -> None:
    lines = [
        [f"{name} of the steps, PSNR dB", *_three(values, ".1f", worst=min)] for name, values in series["fewer"].items()
    ]
    for kind, label in (("random", "a random error"), ("along", "an error along the trajectory")):
        lines += [[f"{label} at {at}, growth", *_three(series["growth"][kind][at], ".2f", worst=max)] for at in PLACES]
    console.table(f"{cfg.model.name}: realism", ["", "mean", "median", "worst"], lines)


def _three(values: list[float], form: str, worst: Any) -> list[str]:
    return [f"{number:{form}}" for number in (np.mean(values), np.median(values), worst(values))]
