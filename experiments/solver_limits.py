"""`experiment=solver_limits`: when does a fitted solver break? What it is fitted to is not what it is run on.

Each condition changes one thing between the fit and the run. It is compared, prompt by prompt, with a solver that was fitted to
what is run: same number of steps, same test prompts, same noise.

- *prompts of another kind*: fitted to the shorter half of the prompts, run on the longer ones (one object, then two);
- *guidance*, *size*, *weights*: fitted at another scale; run at another size; run on a transformer whose weights a random
  low-rank change has moved, as an adapter does;
- *how much it has seen*: fewer prompts, fewer positions of the latents;
- *nodes*: spread evenly, crowded early, crowded late, in place of planned ones; planned for the worst prompt, or with local errors
  that count by how they grow to the end; moved one by one where cross-validation finds that better;
- *how it is fitted*: plain squares, to recorded trajectories alone, with two terms or all six and no choice.

Another number of steps is refused by the scheduler, and another grid too. `series.conditions`: by title, PSNR by prompt, that
of the matched solver, and the share of flips (below 30 dB). `series.predicted`: what cross-validation expected of the solver as
calibrated. `series.moved`: PSNR between uncached samples before and after the change of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import erta
from analysis import worst
from analysis.comparison import FLIPPED_DB, IDENTICAL_DB
from analysis.figures import slug
from analysis.records import Measured
from analysis.style import save
from erta.errors import ErtaError
from erta.pipeline import find_denoiser
from experiments.bench.fidelity import psnr_db
from experiments.bench.scene import scene_agreement
from experiments.harness import config
from experiments.harness.arm import Arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.calibrations import CALIBRATION_SEED
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.harness.worst import sides
from experiments.methods.common.solvers import kept_solver, kept_trajectories, solver_arm, step_bar
from experiments.methods.fewer_steps import running_under
from experiments.output import console
from experiments.output.clips import write_animation
from experiments.prompts.choose import Prompt, calibration_prompts, test_prompts

PLAIN, SIZE, WEIGHTS = "as calibrated", "another size", "changed weights"
CROWDED = 1.6  # exponent of nodes that crowd at one end
RANK = 4  # of the change of weights
GROWTH_PLACES, GROWTH_PROMPTS = 7, 4
Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Condition:
    """A solver that was fitted to one thing and is run on another.

    Attributes:
        place: what it is run on: PLAIN, SIZE or WEIGHTS.
        solver: fitted elsewhere.
        matched: fitted to what is run.
        longer: only prompts longer than the median are counted.
    """

    title: str
    place: str
    solver: erta.FittedScheduler
    matched: erta.FittedScheduler
    longer: bool = False


@dataclass(frozen=True)
class Place:
    """What solvers are run on."""

    setup: Setup
    change: Change = nullcontext


def run(cfg: DictConfig, folder: Path) -> None:
    """Fit every solver, run all on the test prompts; write `rows.jsonl`, the figure, `table.md` and `record.json`."""
    own, setup, prompts = cfg.solver_limits, Setup(cfg), test_prompts(cfg)
    if len(prompts) < 2:
        raise ErtaError("solver_limits compares prompts: give bench.num_prompts=2 or more")
    places = {
        PLAIN: Place(setup),
        SIZE: Place(Setup(with_overrides(*other_size(cfg)), setup.pipe)),
        WEIGHTS: Place(setup, lambda: changed_weights(find_denoiser(setup.pipe), own.weights)),
    }
    conditions = fit_all(cfg, places)
    median = float(np.median([len(prompt.text) for prompt in prompts]))

    def measure(prompt: Prompt) -> dict[str, Any]:
        found: dict[str, Any] = {"psnr_db": {}, "matched": {}}
        for name, place in places.items():
            with place.change():
                uncached = Arm(None, place.setup.kwargs).sample(setup.pipe, prompt).frames
                if name == PLAIN:
                    plain = uncached
                if name == WEIGHTS:
                    found["moved"] = _psnr(plain, uncached)
                seen: dict[int, float] = {}
                for one in (one for one in conditions if one.place == name):
                    if one.longer and len(prompt.text) <= median:
                        continue
                    for key, solver in (("psnr_db", one.solver), ("matched", one.matched)):
                        if id(solver) not in seen:
                            frames = solver_arm(place.setup, solver).sample(setup.pipe, prompt).frames
                            seen[id(solver)] = _psnr(uncached, frames)
                        found[key][one.title] = seen[id(solver)]
        return found

    lines = by_prompt("solver limits", prompts, measure, folder / "rows.jsonl")
    shown = {one.title: _outcome(one.title, lines) for one in conditions}
    predicted = conditions[0].solver.report["predicted"]
    series = {
        "conditions": shown,
        "predicted": None if predicted is None else rounded(predicted["psnr_db"]),
        "moved": rounded([line["moved"] for line in lines]),
    }
    claims = [
        Measured(
            text=f"{title}: no worse than fitted for it",
            paper="",
            ours=f"{np.mean(one['psnr_db']):.1f} against {np.mean(one['matched']):.1f} dB",
            values=rounded((np.array(one["psnr_db"]) - np.array(one["matched"])).tolist()),
            unit="dB",
        )
        for title, one in shown.items()
        if title != PLAIN
    ]
    _show(cfg, series)
    show_worst(setup, folder, prompts, shown[PLAIN]["psnr_db"], conditions[0].solver, own.worst)
    finish_figure(cfg, folder, prompts, series, claims)


def show_worst(
    setup: Setup, folder: Path, prompts: list[Prompt], psnr: list[float], solver: erta.FittedScheduler, count: int
) -> None:
    """The prompts with the lowest PSNR as calibrated, in `figures/worst.png`."""
    if not count:
        return
    lowest = [int(index) for index in np.argsort(psnr, kind="stable")[:count]]
    uncached, made = sides(setup, solver_arm(setup, solver))
    bad, kept = [], folder / worst.FOLDER / slug(PLAIN)
    kept.mkdir(parents=True, exist_ok=True)
    for index in lowest:
        prompt = prompts[index]
        pair = [uncached(prompt), made(prompt)]
        read = [scene_agreement(prompt, frames) for frames in pair]
        bad.append(worst.Bad(index, prompt.text, psnr[index], read[0] != read[1]))
        for path, frames in zip(bad[-1].files(kept), pair, strict=True):
            write_animation(frames, path)
    (folder / "figures").mkdir(exist_ok=True)
    path = save(worst.worst_figure("fitted solver", bad, kept), folder / "figures" / "worst")[0]
    console.note(f"written: {path}")


def fit_all(cfg: DictConfig, places: dict[str, Place]) -> list[Condition]:
    """Every condition with its solvers; the first one is as calibrated."""
    own, setup, few = cfg.solver_limits, places[PLAIN].setup, cfg.calibration.num_prompts
    most = max([few, 2 * few, *own.prompts])
    texts = calibration_prompts(with_overrides(f"calibration.num_prompts={most}"))
    seeds = [CALIBRATION_SEED + k for k in range(most)]
    every = kept_trajectories(setup, "limits-trajectories", texts, seeds)
    usual = every.only(range(few))
    plain = fitted(setup, usual, validate=True, placement="best")
    placed = plain.report["placement"]  # what it chose, all others take

    def condition(title: str, seen: erta.Trajectories, longer: bool = False, **asked: Any) -> Condition:
        return Condition(title, PLAIN, fitted(setup, seen, **{"placement": placed, **asked}), plain, longer)

    found = [Condition(PLAIN, PLAIN, plain, plain)]
    shortest = np.argsort([len(text) for text in every.record["prompts"]], kind="stable")[:few]
    found.append(condition("fitted to short prompts, run on long ones", every.only(sorted(shortest.tolist())), True))
    dial = "guidance_scale" if cfg.model.true_cfg_scale is None else "true_cfg_scale"
    for scale in own.guidances:
        if scale != cfg.model[dial]:
            elsewhere = Setup(with_overrides(f"model.{dial}={scale:g}"), setup.pipe)
            seen = kept_trajectories(elsewhere, "limits-trajectories", texts[:few], seeds[:few])
            found.append(
                Condition(f"fitted at guidance {scale:g}", PLAIN, fitted(elsewhere, seen, placement=placed), plain)
            )
    for name, title in ((SIZE, "run at another size"), (WEIGHTS, f"run on weights changed by {own.weights:g}")):
        there = places[name]
        with there.change():
            # what is known of a model is looked up again: its weights have changed
            changed = Setup(there.setup.cfg, setup.pipe)
            seen = kept_trajectories(changed, "limits-trajectories", texts[:few], seeds[:few])
            found.append(Condition(title, name, plain, fitted(changed, seen, placement=placed)))
    found += [
        condition(f"fitted to {count} prompt{'s' if count > 1 else ''}", every.only(range(count)))
        for count in own.prompts
        if count != few
    ]
    total = usual.latents.shape[2]
    for count in (count for count in own.positions if count < total):
        chosen = np.random.default_rng(0).choice(total, count, replace=False)
        found.append(condition(f"fitted to {count} of {total} positions", _at(usual, np.sort(chosen))))
    steps, count = cfg.model.num_inference_steps, setup.step_count()
    found += [condition(f"nodes {name}", usual, nodes=nodes) for name, nodes in spread_nodes(steps, count).items()]
    return found + [condition(title, usual, **asked) for title, asked in other_ways(setup, usual, own.refine).items()]


def other_ways(setup: Setup, usual: erta.Trajectories, refine: int) -> dict[str, dict[str, Any]]:
    """By title, options of `erta.fit` that are not the usual ones; nodes are refined where there are prompts to leave out."""
    found: dict[str, dict[str, Any]] = {
        "nodes for the worst prompt": {"over_prompts": "worst", "placement": "planned"},
        "nodes by errors as they grow": {"step_weights": error_growth(setup, usual), "placement": "planned"},
        "fitted by plain squares": {"weighted": False},
        "fitted in an open loop": {"loop": "open"},
        "fitted with two terms": {"terms": 2},
        "fitted with all six terms": {"terms": 6},
    }
    if refine and usual.num_prompts > 1:
        found[f"nodes refined by {refine} moves"] = {"refine": refine, "validate": True}
    return found


def error_growth(setup: Setup, usual: erta.Trajectories) -> tuple[float, ...]:
    """How much an error at the end of each step grows to the end of the run, (N,): the geometric mean over prompts.

    Measured by runs under Euler's rule at a few places, and interpolated between them.
    """
    total = setup.cfg.model.num_inference_steps
    places = sorted({round(share * (total - 1)) for share in np.linspace(0, 1, GROWTH_PLACES)})
    texts, seeds = (usual.record[key][:GROWTH_PROMPTS] for key in ("prompts", "seeds"))

    def measure() -> dict[str, Any]:
        gains = []
        with running_under(setup, "flow_match_euler"), console.progress_bar() as bar:
            for text, seed in bar.track(list(zip(texts, seeds, strict=True)), description="growth of errors"):
                gains.append(erta.propagation_gain(setup.pipe, text, places, seed=seed, **setup.kwargs)[:, 0].tolist())
        return {"gains": gains}

    gains = kept(setup, "growth", [texts, seeds, places], measure)["gains"]
    logs = np.log(np.maximum(gains, np.finfo(float).tiny)).mean(axis=0)
    return tuple(np.exp(np.interp(np.arange(total), places, logs)).tolist())


def fitted(
    setup: Setup,
    seen: erta.Trajectories,
    validate: bool = False,
    nodes: tuple[int, ...] | None = None,
    **asked_for: Any,
) -> erta.FittedScheduler:
    """A solver with the budget's number of steps, found or made. `asked_for`: fields of `erta.FitOptions`."""
    options, count = erta.FitOptions(validate=validate, **asked_for), setup.step_count()
    asked = {"steps": count} if nodes is None else {"nodes": nodes}

    def make() -> erta.FittedScheduler:
        with step_bar(f"fit {count} steps to {seen.num_prompts} prompts") as advance:
            return erta.fit(setup.pipe, seen, options=options, on_step=advance, **asked)

    kept_for = [count, asdict(options), nodes, seen.record["prompts"], seen.record["seeds"], seen.positions.tolist()]
    return kept_solver(setup, "limits", kept_for, make)


def spread_nodes(steps: int, count: int) -> dict[str, tuple[int, ...]]:
    """Nodes that were not planned, `count` of `steps` from 0 on: evenly, and crowded at either end."""
    share = np.arange(count) / count
    places = {"evenly spread": share, "crowded early": share**CROWDED, "crowded late": 1 - (1 - share) ** CROWDED}
    found = {}
    for name, at in places.items():
        nodes = np.round(at * steps).astype(int)
        for k in range(1, count):  # each one its own, in order, with room for those that follow
            nodes[k] = min(max(nodes[k], nodes[k - 1] + 1), steps - count + k)
        found[name] = tuple(int(node) for node in nodes)
    return found


@contextmanager
def changed_weights(transformer: torch.nn.Module, strength: float, seed: int = 0) -> Iterator[None]:
    """Every linear layer's weight moved by a random change of rank 4, `strength` of its own norm; taken back at the end."""
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in transformer.modules() if isinstance(module, torch.nn.Linear)]
    before = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                up = torch.randn(layer.weight.shape[0], RANK, generator=generator)
                down = torch.randn(RANK, layer.weight.shape[1], generator=generator)
                change = (up @ down).to(layer.weight)
                layer.weight.add_(change, alpha=strength * float(layer.weight.norm() / change.norm()))
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


def other_size(cfg: DictConfig) -> list[str]:
    """Overrides for a longer clip, or a wider picture."""
    model = cfg.model
    if model.num_frames is not None:
        return [f"model.num_frames={2 * (model.num_frames - 1) + 1}"]
    return [f"model.width={model.width * 3 // 2}"]


def with_overrides(*overrides: str) -> DictConfig:
    """The configuration of this run with a few values changed."""
    cfg = compose("config", overrides=[*HydraConfig.get().overrides.task, *overrides])
    config.validate(cfg)
    return cfg


def _at(seen: erta.Trajectories, chosen: np.ndarray) -> erta.Trajectories:
    """The same trajectories at fewer positions."""
    arrays = {"positions": seen.positions[chosen], "channels": seen.channels[chosen]}
    return replace(seen, latents=seen.latents[:, :, chosen], outputs=seen.outputs[:, :, chosen], **arrays)


def _psnr(wanted: np.ndarray, found: np.ndarray) -> float:
    value = psnr_db(wanted, found)
    return IDENTICAL_DB if value is None else value


def _outcome(title: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    counted = [line for line in lines if title in line["psnr_db"]]
    values, matched = ([line[key][title] for line in counted] for key in ("psnr_db", "matched"))
    return {
        "psnr_db": rounded(values),
        "matched": rounded(matched),
        "flips": float(np.mean(np.array(values) < FLIPPED_DB)),
        "prompts": [line["prompt"] for line in counted],
    }


def _show(cfg: DictConfig, series: dict[str, Any]) -> None:
    rows = []
    for title, one in series["conditions"].items():
        values, matched = np.array(one["psnr_db"]), np.array(one["matched"])
        shown = [values.mean(), np.median(values), values.min()]
        rows.append([title, *(f"{value:.1f}" for value in shown), f"{one['flips']:.0%}", f"{matched.mean():.1f}"])
    columns = ["", "PSNR dB", "median", "worst", "flips", "fitted for it"]
    console.table(f"{cfg.model.name}: a fitted solver away from home", columns, rows)
    if series["predicted"] is not None:
        console.note(
            f"predicted by cross-validation: mean {np.mean(series['predicted']):.1f}, "
            f"median {np.median(series['predicted']):.1f} dB"
        )
    console.note(f"the change of weights moves uncached samples to {np.median(series['moved']):.1f} dB (median)")
