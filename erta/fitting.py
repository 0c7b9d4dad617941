"""A solver fitted to uncached trajectories: nodes by dynamic programming, coefficients in closed form along its own run.

At node k, with the run's own latent x, the next one is

    x[k+1] = x + sum_f c[k, f] F_f,    F = (v_k, v_{k-1}, v_{k-2}, x, x - x_{k-1}, x - x_{k-2}),

six numbers a step. *Closed loop*: the run of K steps is carried out on all calibration prompts at once; at each node c[k]
solves a weighted ridge least squares for `x_uncached[n_{k+1}] - x`, and the step is taken with it. So later coefficients know
the errors of earlier ones, and partly undo them. *Open loop*: the same, fitted to the recorded trajectories alone. Prompts
count by 1 / error, since the metric is a mean of decibels and plain squares would let the few hard prompts decide. The ridge
pulls towards the pipeline's own solver on the same nodes.

Cross-validation costs one more run: each prompt is taken along with coefficients of all others.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from erta.baseline import ertacache_scheduler
from erta.errors import BudgetError, ErtaError, choice_index
from erta.fit_runs import Choose, OnStep, Runs
from erta.fitted_scheduler import FittedScheduler, model_of
from erta.grid import computed_sigmas
from erta.least_squares import (
    CONTRASTS,
    MEMORY,
    TERMS,
    as_tables,
    as_terms,
    best_setting,
    features_of,
    leave_one_out,
    products_of,
    solve,
)
from erta.nodes import Nodes, climbed, nodes_for, placed_nodes
from erta.options import BRANCHES, LOOPS, PLACEMENTS
from erta.pipeline import check_bare
from erta.policy import steps_for_speedup
from erta.quality import Quality
from erta.scheduler import nominal_sigmas, with_grid
from erta.signature import check_signature, model_signature
from erta.solver import Solver, linear_solver
from erta.solver_files import MadeFor
from erta.trajectories import Trajectories


@dataclass(frozen=True)
class FitOptions:
    """How a solver is fitted.

    Attributes:
        loop: `closed`, `open`, or the `best` of both by cross-validation.
        branches: `together`: the solver sees the guided output, as any scheduler does; `apart`: it also sees how the guidance
            branches differ, which gives three more terms, and runs inside `erta.branches_apart(pipe)`.
        terms: how many of the six terms a step may use; None: as many as cross-validation of each step finds best. The same holds
            of the three that `apart` adds: all, or as many as are best.
        ridge: pull towards the pipeline's own solver, relative to the size of each term; None: cross-validated.
        weighted: prompts count by 1 / error; False: plain squares.
        over_prompts: nodes for the `mean` or the `worst` prompt's local error.
        step_weights: of a local error that is there after each of the N steps; None: even. Some let it count by how it grows to
            the end (`erta.propagation_gain`).
        placement: nodes are `planned`, spread `even`ly, or the `best` of both by cross-validation (see `erta.nodes`), one run
            more; without it, planned.
        refine: then a node is moved, up to so many times, and stays where cross-validation finds it better: each a run more. What
            is predicted of such nodes was chosen to be good, and promises a little too much.
        validate: predict the error by a run with coefficients of all other prompts.
        baseline: beside it predict plain ERTACache at the same budget, one run more, and warn where it is ahead.
    """

    loop: str = "closed"
    branches: str = "together"
    terms: int | None = None
    ridge: float | None = None
    weighted: bool = True
    over_prompts: str = "mean"
    step_weights: Sequence[float] | None = None
    placement: str = "best"
    refine: int = 0
    validate: bool = True
    baseline: bool = True

    def __post_init__(self) -> None:
        choice_index("loop", self.loop, LOOPS)
        choice_index("placement", self.placement, PLACEMENTS)
        choice_index("branches", self.branches, BRANCHES)
        if self.terms is not None and not 1 <= self.terms <= len(TERMS):
            raise ErtaError(f"terms must be 1 to {len(TERMS)}, not {self.terms}")
        if self.branches == "apart" and self.loop != "closed":
            raise ErtaError(f"branches='apart' is fitted along its own run: loop must be closed, not {self.loop!r}")
        if self.ridge is not None and not self.ridge >= 0:
            raise ErtaError(f"ridge must be a number ≥ 0, not {self.ridge}")
        if self.refine < 0:
            raise ErtaError(f"refine must be a number ≥ 0 of moves, not {self.refine}")
        if self.refine and not self.validate:
            raise ErtaError("refine moves nodes by cross-validation: it needs validate=True")
        if self.step_weights is not None:
            object.__setattr__(self, "step_weights", tuple(map(float, self.step_weights)))  # plain, to be written

    @property
    def names(self) -> tuple[str, ...]:
        """The terms that a step may use."""
        return TERMS if self.branches == "together" else TERMS + CONTRASTS


def fit(
    pipe: Any,
    trajectories: Trajectories,
    *,
    steps: int | None = None,
    speedup: float | None = None,
    psnr_db: float | None = None,
    nodes: Sequence[int] | None = None,
    options: FitOptions | None = None,
    batch_size: int = 1,
    on_step: OnStep | None = None,
    **pipeline_kwargs: Any,
) -> FittedScheduler:
    """A solver with as few steps as asked for, fitted to the uncached trajectories of calibration prompts.

    Args:
        pipe: the pipeline that they were recorded on (`erta.record`).
        trajectories: of four prompts or more.
        steps, speedup, psnr_db: exactly one: a number of steps, N over it, or what PSNR to the uncached samples is to be
            reached as a median over prompts (by cross-validation, which searches: about six runs, and one to fit).
        nodes: instead of those: the steps of the nominal grid at which the transformer runs.
        options: see `FitOptions`.
        batch_size: prompts in one call.
        on_step: called after every step of all prompts with how many are done and how many there are.
        pipeline_kwargs: go to the pipeline, beside those that the trajectories were recorded with.

    Raises BudgetError for a budget that cannot be met, SignatureMismatch for trajectories of another model, ErtaError for
    another grid, NonFiniteError if an output is not finite. Warns, in a line, where plain ERTACache is predicted to do better.
    """
    check_bare(pipe)
    check_signature(trajectories.signature, model_signature(pipe))
    fitting = _Fitting(pipe, trajectories, options or FitOptions(), batch_size, on_step, pipeline_kwargs)
    given = {"steps": steps, "speedup": speedup, "psnr_db": psnr_db, "nodes": nodes}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise BudgetError(f"give exactly one of steps, speedup, psnr_db and nodes, not {', '.join(named) or 'none'}")
    made = _fitted(fitting, steps, speedup, psnr_db, nodes)
    if made.report["warning"]:
        warnings.warn(made.report["warning"], stacklevel=2)
    return made


def _fitted(
    fitting: _Fitting, steps: int | None, speedup: float | None, psnr_db: float | None, nodes: Sequence[int] | None
) -> FittedScheduler:
    if psnr_db is not None:
        return fitting.reaching(psnr_db)
    if nodes is not None:
        if fitting.options.refine:
            raise ErtaError("nodes= are taken as they are: leave out refine")
        return fitting.on(tuple(nodes), asked={"nodes": list(nodes)})
    total, takeover = fitting.recorded.num_steps, fitting.recorded.signature["takeover"]
    count = steps if steps is not None else steps_for_speedup(total, float(speedup or 0), takeover)
    return fitting.with_steps(count, asked={"steps": steps, "speedup": speedup})


class _Fitting:
    """One pipeline and its trajectories, for any budget."""

    def __init__(
        self,
        pipe: Any,
        trajectories: Trajectories,
        options: FitOptions,
        batch_size: int,
        on_step: OnStep | None,
        pipeline_kwargs: dict[str, Any],
    ) -> None:
        self.pipe, self.recorded, self.options = pipe, trajectories, options
        self.scheduler = with_grid(pipe.scheduler, trajectories.sigmas)
        self.runs = Runs(pipe, trajectories, {**trajectories.record["call"], **pipeline_kwargs}, batch_size, on_step)

    def reaching(self, psnr_db: float) -> FittedScheduler:
        """The fewest steps whose predicted median PSNR is not below, by bisection."""
        if not self.recorded.decoded.shape[1]:
            raise ErtaError("a PSNR is of decoded samples: record the trajectories with decode=True")
        if self.recorded.num_prompts < 2:
            raise ErtaError("a PSNR is predicted by cross-validation, which needs two prompts or more")
        since = time.perf_counter(), self.runs.forwards
        low, high = 0, self.recorded.num_steps
        predicted: dict[Nodes, dict[str, Quality]] = {}
        while high - low > 1:
            middle = (low + high) // 2
            nodes = nodes_for(self.recorded, middle, self.options.over_prompts, self.options.step_weights)
            predicted[nodes] = self._predicted(nodes)
            if _best(predicted[nodes]).summary()["median_psnr_db"] >= psnr_db:
                high = middle
            else:
                low = middle
        if high == self.recorded.num_steps:
            raise BudgetError(
                f"only all {self.recorded.num_steps} steps reach {psnr_db:g} dB: there is nothing to save"
            )
        return self.with_steps(high, {"psnr_db": psnr_db}, predicted, since)

    def with_steps(
        self,
        count: int,
        asked: dict[str, Any],
        known: dict[Nodes, dict[str, Quality]] | None = None,
        since: tuple[float, int] | None = None,
    ) -> FittedScheduler:
        """A solver of `count` steps on the nodes that are best by cross-validation. `known`: what was predicted before."""
        options, known = self.options, known or {}
        since = since or (time.perf_counter(), self.runs.forwards)
        places = placed_nodes(self.recorded, count, options.placement, options.over_prompts, options.step_weights)
        if options.refine and not self._validates:
            raise ErtaError("refine moves nodes by cross-validation: it needs two prompts or more")
        if (len(places) == 1 and not options.refine) or not self._validates:
            name, nodes = next(iter(places.items()))
            return self.on(nodes, asked, known.get(nodes), since, {name: None})
        predicted = {nodes: known.get(nodes) or self._predicted(nodes) for nodes in places.values()}

        def score(nodes: Nodes) -> float:
            if nodes not in predicted:
                predicted[nodes] = self._predicted(nodes)
            return _best(predicted[nodes]).score

        name = max(places, key=lambda one: score(places[one]))
        if options.refine:
            takeover = self.recorded.signature["takeover"]
            refined = climbed(places[name], self.recorded.num_steps, score, options.refine, takeover)
            if refined != places[name]:
                name, places = "refined", {**places, "refined": refined}
        scores = {one: score(nodes) for one, nodes in places.items()}
        return self.on(places[name], asked, predicted[places[name]], since, scores)

    @property
    def _validates(self) -> bool:
        return self.options.validate and self.recorded.num_prompts > 1

    def _predicted(self, nodes: Nodes) -> dict[str, Quality]:
        """By loop, the error of a run in which each prompt takes coefficients of all others."""
        frame = self._frame(nodes)
        own = self._own(frame)
        loops = ("closed", "open") if self.options.loop == "best" else (self.options.loop,)
        return {loop: self.runs.along(frame, self._choose(frame, own, loop, hold_out=True))[1] for loop in loops}

    def on(
        self,
        nodes: Nodes,
        asked: dict[str, Any],
        predicted: dict[str, Quality] | None = None,
        since: tuple[float, int] | None = None,
        placements: Mapping[str, float | None] | None = None,
    ) -> FittedScheduler:
        """Coefficients on given nodes, and the error that cross-validation predicts, if it is not given.

        `since`: the time and the number of forwards at which the work on it began; None: now. `placements`: that nodes were
        chosen from, with what was predicted, for the report.
        """
        started, forwards = since or (time.perf_counter(), self.runs.forwards)
        options = self.options
        if options.loop == "best" and not self._validates:
            raise ErtaError("loop='best' is chosen by cross-validation: two prompts or more, and validate=True")
        if predicted is None:
            predicted = self._predicted(nodes) if self._validates else {}
        frame = self._frame(nodes)
        own = self._own(frame)
        loop = max(predicted, key=lambda name: predicted[name].score) if predicted else options.loop
        chosen: list[dict[str, Any]] = []
        choose = self._choose(frame, own, loop, hold_out=False, note=chosen.append)
        if loop == "closed":
            coefficients, quality = self.runs.along(frame, choose)
            fitted: dict[str, Any] | None = quality.summary()
        else:
            coefficients, fitted = np.stack([choose(k, np.empty(0))[0] for k in range(frame.num_steps)]), None
        expected = predicted.get(loop)
        ertacache = self._ertacache(len(nodes)) if expected and options.baseline else None
        report = {
            "policy": "fitted solver",
            "asked": {key: value for key, value in asked.items() if value is not None},
            "nodes": list(nodes),
            "num_nominal": frame.num_nominal,
            "options": asdict(options),
            "loop": loop,
            "steps": chosen,
            "fitted_to": {key: self.recorded.record[key] for key in ("prompts", "seeds", "dtype", "device")},
            "guidance_scale": self.recorded.signature["guidance_scale"],
            "guidance_scale_2": self.recorded.signature["guidance_scale_2"],
            "true_cfg_scale": self.recorded.signature.get("true_cfg_scale"),
            "on_calibration": fitted,
            "predicted": expected.summary() if expected else None,
            "predicted_by_loop": {name: quality.score for name, quality in predicted.items()},
            "placement": max(placements, key=lambda name: placements[name] or 0.0) if placements else None,
            "predicted_by_placement": dict(placements or {}),
            "predicted_ertacache": ertacache.summary() if ertacache else None,
            "warning": _behind(frame, expected, ertacache) if expected and ertacache else None,
            "forwards": self.runs.forwards - forwards,
            "seconds": time.perf_counter() - started,
        }
        made_for = self._made_for(nodes)
        return FittedScheduler(_with_coefficients(frame, coefficients, report), self.pipe.scheduler, made_for)

    def _ertacache(self, count: int) -> Quality:
        """The error of plain ERTACache at the same budget."""
        return self.runs.alone(ertacache_scheduler(self.pipe.scheduler, self.recorded, count))

    def _made_for(self, nodes: Nodes) -> MadeFor:
        signature, record = self.recorded.signature, self.recorded.record
        takeover = signature["takeover"]
        return MadeFor(
            latent_shape=tuple(signature["latent_shape"]),
            channel_axis=record["channel_axis"],
            takeover=None if takeover is None else sum(node < takeover for node in nodes),
            model=model_of(self.pipe),
        )

    def _frame(self, nodes: Nodes) -> Solver:
        """The solver's nodes and grid, with coefficients that do nothing."""
        steps, grid = self.recorded.num_steps, self.recorded.sigmas
        if not nodes or nodes[0] != 0 or sorted(set(nodes)) != list(nodes) or nodes[-1] >= steps:
            raise BudgetError(f"nodes ascend from 0 to at most {steps - 1}, unlike {list(nodes)}")
        nothing = np.zeros((len(nodes), MEMORY, 1))
        timesteps = np.asarray(torch.as_tensor(self.scheduler.timesteps).cpu())[list(nodes)]
        contrast = nothing if self.options.branches == "apart" else None
        return Solver(nodes, grid[[*nodes, -1]], timesteps, grid, nothing, nothing, nothing[:, 0], contrast=contrast)

    def _own(self, frame: Solver) -> np.ndarray:
        """The pipeline's own solver on these nodes in the terms, (K, F); Euler's rule if it looks back farther."""
        mask = tuple(step in frame.nodes for step in range(frame.num_nominal))
        grid = with_grid(self.pipe.scheduler, computed_sigmas(frame.nominal_sigmas, mask))
        solver = linear_solver(grid, (True,) * frame.num_steps)
        found = np.zeros((frame.num_steps, len(self.options.names)))
        if solver.memory > MEMORY:
            found[:, 0] = np.diff(nominal_sigmas(grid))
        else:
            found[:, : len(TERMS)] = as_terms(solver)
        return found

    def _choose(
        self,
        frame: Solver,
        own: np.ndarray,
        loop: str,
        hold_out: bool,
        note: Callable[[dict[str, Any]], None] = lambda said: None,
    ) -> Choose:
        """What chooses the coefficients of a step, (P, F), from the products of target and terms, (P, F + 1, F + 1)."""
        options, nodes = self.options, (*frame.nodes, frame.num_nominal)

        def choose(k: int, products: np.ndarray) -> np.ndarray:
            if loop == "open":
                latents = [self.recorded.latents[:, nodes[k - lag]] for lag in range(min(MEMORY, k + 1))]
                outputs = [self.recorded.outputs[:, nodes[k - lag]] for lag in range(min(MEMORY, k + 1))]
                target = self.recorded.latents[:, nodes[k + 1]] - latents[0]
                products = products_of(target, features_of(outputs, latents))
            terms, ridge = best_setting(products, own[k], options.terms, options.ridge, options.weighted)
            note({"terms": [options.names[term] for term in terms], "ridge": ridge})
            if not hold_out:
                found = solve(products, own[k], terms, ridge, options.weighted)
                return np.broadcast_to(found, (len(products), len(found)))
            return leave_one_out(products, own[k], terms, ridge, options.weighted)

        return choose


def _behind(frame: Solver, expected: Quality, ertacache: Quality) -> str | None:
    """A line that says so where plain ERTACache is predicted to do better."""
    if expected.score >= ertacache.score:
        return None
    measure = "latent error" if expected.psnr_db is None else "PSNR"
    return (
        f"{frame.num_steps} of {frame.num_nominal} steps: {expected.score:.1f} dB are predicted, but {ertacache.score:.1f} of plain "
        f"ERTACache ({measure}, mean over the calibration prompts): use that, or more steps"
    )


def _best(predicted: dict[str, Quality]) -> Quality:
    return max(predicted.values(), key=lambda one: one.score)


def _with_coefficients(frame: Solver, coefficients: np.ndarray, report: dict[str, Any]) -> Solver:
    tables: dict[str, Any] = {name: table[:, :, None].copy() for name, table in as_tables(coefficients).items()}
    return replace(frame, **tables, report=report)
