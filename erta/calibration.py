"""Offline calibration: one uncached pass over a few prompts, then plans for any threshold or budget."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from erta.architectures import architecture_of
from erta.errors import BudgetError, ErtaError, NonFiniteError, choice_index
from erta.files import save_arrays
from erta.grid import adjusted_sigmas, longer_last_step, step_scale
from erta.guidance import combining_scale_of, guidance_scale_of, second_scale_of
from erta.hooks import observed
from erta.loading import Fields, arrays_of, check_array
from erta.options import PHI_DENOMINATORS, RECTIFIER_FORMS, RECTIFIERS, REL_L1_DENOMINATORS, SITES, PlanOptions
from erta.pipeline import call_arguments, check_bare, find_denoiser, find_denoisers, latent_call
from erta.plan import Plan, Rectification
from erta.policy import (
    Mask,
    budget_mask,
    check_count,
    reuse_errors,
    sources,
    steps_for_speedup,
    threshold_mask,
    uniform_mask,
)
from erta.prompts import single_calls
from erta.rectifier import LinearRectifier, fit_linear
from erta.scheduler import first_index, has_movable_sigmas
from erta.signature import argument_signature, check_signature, model_signature
from erta.site import make_site
from erta.statistics import PairStatistics, TrajectoryObserver

SCHEMA = "erta.calibration/2"
DEFAULT_WINDOW = 16


@dataclass(frozen=True)
class Calibration:
    """Statistics of uncached trajectories, what they were made for (`signature`) and how (`record`)."""

    statistics: PairStatistics
    signature: dict[str, Any]
    record: dict[str, Any]

    @property
    def num_steps(self) -> int:
        return len(self.signature["sigmas"]) - 1

    @property
    def takeover(self) -> int | None:
        """The step from which the second transformer ran: 0 if always, num_steps if never; None if there is one only."""
        return self.signature.get("takeover")

    def rel_l1(self, denominator: str = "ground_truth") -> np.ndarray:
        """The profile that schedules are made from, (num_steps, window): mean over prompts and branches.

        `||r[c] - r[i]||_1` over `||r[i]||_1` (ground_truth) or over `||r[c]||_1` (cached).
        """
        index = choice_index("rel_l1_denominator", denominator, REL_L1_DENOMINATORS)
        return np.where(self.statistics.rel_l1.count[index] > 0, self.statistics.rel_l1.mean[index], np.nan)

    def plan(
        self,
        *,
        threshold: float | None = None,
        speedup: float | None = None,
        steps: int | None = None,
        options: PlanOptions | None = None,
        **changes: Any,
    ) -> Plan:
        """A plan for exactly one of a threshold, a speed-up in forwards, or a number of computed steps.

        Args:
            options: how the plan is made (see `PlanOptions`); None: the paper's method.
            changes: single fields of `PlanOptions`, as in `plan(speedup=2.0, rectify=False)`.

        Raises BudgetError for a budget that cannot be met, ErtaError for options that do not go together.
        """
        options = replace(options or PlanOptions(), **changes)
        rel_l1 = self.rel_l1(options.rel_l1_denominator)
        mask = self._mask(rel_l1, threshold, speedup, steps, options.policy)
        longest = max(step - source for step, source in enumerate(sources(mask)))
        if longest > rel_l1.shape[1]:
            raise BudgetError(
                f"this plan reuses over {longest} steps, more than the calibration's window of {rel_l1.shape[1]}: "
                "ask for more computed steps or calibrate with a larger window"
            )
        if all(mask) and threshold is not None:
            neighbours = rel_l1[1:, 0]
            smallest = float(np.min(neighbours[np.isfinite(neighbours)], initial=np.inf))
            warnings.warn(
                f"threshold {threshold:g} reuses nothing: the smallest change between two steps is {smallest:.4g}",
                stacklevel=2,
            )
        self._check_time(options)
        sigmas = np.array(self.signature["sigmas"], dtype=np.float32)
        phi = self.phi(mask, options.phi_denominator)
        moved = adjusted_sigmas(sigmas, mask, phi, self.takeover) if options.adjust_time else sigmas
        if options.time_form == "last_step":
            moved = longer_last_step(sigmas, moved, self.takeover)
        errors = reuse_errors(rel_l1, mask)
        if not np.isfinite(errors).all():
            raise BudgetError(
                "this plan reuses over more of the grid than the calibration's window: ask for more steps"
            )
        return Plan(
            mask=mask,
            sigmas=moved,
            nominal_sigmas=sigmas,
            site=self.signature["site"],
            reuse=options.reuse,
            rectification=self.rectification(mask, options.rectifier, options.rectifier_form)
            if options.rectify
            else None,
            corrector_at_reused=options.corrector_at_reused,
            branches=tuple(self.signature["branches"]),
            latent_shape=tuple(self.signature["latent_shape"]),
            guidance_scale=self.signature["guidance_scale"],
            guidance_scale_2=self.signature.get("guidance_scale_2"),
            takeover=self.takeover,
            signature={**self.signature, "dtype": self.record.get("dtype")},
            report={
                "threshold": threshold,
                "speedup_asked": speedup,
                "steps_asked": steps,
                **_options_that_count(options),
                "phi": [None if m else float(p) for m, p in zip(mask, phi, strict=True)]
                if options.adjust_time and options.time_form == "phi"
                else None,
                "interpolated_from_steps": self.record.get("interpolated_from_steps"),
                "reuse_error_mean": float(errors.sum() / max(1, mask.count(False))),
                "reuse_error_max": float(errors.max()),
            },
        )

    def _check_time(self, options: PlanOptions) -> None:
        """Raise ErtaError if integration steps are to be moved and this calibration cannot tell where."""
        if not options.adjust_time:
            return
        if self.signature["grid"] != "sigmas":
            raise ErtaError(
                f"{self.signature['scheduler'].split()[0]} has no sigmas to move: plan with adjust_time=False "
                "(policy and rectification work)"
            )
        if options.phi_denominator == "increment" and "interpolated_from_steps" in self.record:
            raise ErtaError("phi by increment depends on the step length: calibrate with this number of steps")

    def phi(self, mask: Mask, denominator: str = "velocity") -> np.ndarray:
        """Step scale of every step under a mask, (num_steps,): 1 where computed."""
        ratio = self.statistics.phi_ratio.mean[choice_index("phi_denominator", denominator, PHI_DENOMINATORS)]
        gaps = [step - source for step, source in enumerate(sources(mask))]
        return np.array([step_scale(ratio[i, gap - 1]) if gap else 1.0 for i, gap in enumerate(gaps)], dtype=np.float64)

    def rectification(self, mask: Mask, granularity: str = "channel", form: str = "linear") -> Rectification:
        """Coefficients of every reused step; computed steps hold the identity."""
        choice_index("rectifier_form", form, RECTIFIER_FORMS)
        fit = self._fit(granularity)
        branches, num_steps, _, channels = fit.gain.shape
        gain, offset = np.ones((num_steps, branches, channels)), np.zeros((num_steps, branches, channels))
        for step, source in enumerate(sources(mask)):
            if source != step:
                gain[step], offset[step] = fit.gain[:, step, step - source - 1], fit.offset[:, step, step - source - 1]
        return Rectification(gain=gain, offset=offset, form=form)

    def rectifier_r2(self, mask: Mask, granularity: str = "channel") -> np.ndarray:
        """Share of the error's variance that the rectifier explains, mean over branches and channels; NaN where computed."""
        r2 = self._fit(granularity).r2.mean(axis=(0, 3))
        return np.array([r2[i, i - c - 1] if c != i else np.nan for i, c in enumerate(sources(mask))])

    def _fit(self, granularity: str) -> LinearRectifier:
        moments = self.statistics.moments
        return fit_linear(moments if choice_index("rectifier", granularity, RECTIFIERS) == 0 else moments.pooled())

    def break_even(self, num_computed: int) -> float:
        """After how many generations with so many computed steps the calibration has cost less time than it saved."""
        saved_s = self.record["forward_s"] / len(self.record["prompts"]) * (1 - num_computed / self.num_steps)
        return self.record["seconds"] / saved_s if saved_s > 0 else float("inf")

    def merge(self, other: Calibration) -> Calibration:
        """Calibration over both sets of prompts; raises SignatureMismatch if they are not of one setup."""
        check_signature(self.signature, other.signature)
        record = dict(self.record)
        for key in ("prompts", "skipped", "seconds", "forward_s"):
            record[key] = self.record[key] + other.record[key]
        return Calibration(self.statistics.merge(other.statistics), self.signature, record)

    def _mask(
        self, rel_l1: np.ndarray, threshold: float | None, speedup: float | None, steps: int | None, policy: str
    ) -> Mask:
        given = {"threshold": threshold, "speedup": speedup, "steps": steps}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise BudgetError(f"give exactly one of threshold, speedup and steps, not {', '.join(named) or 'none'}")
        if threshold is not None:
            if policy == "uniform":
                raise BudgetError("the uniform policy has no threshold: give speedup or steps")
            return threshold_mask(rel_l1, threshold)
        total, takeover = self.num_steps, self.takeover
        count = steps if steps is not None else steps_for_speedup(total, float(speedup or 0), takeover)
        check_count(count, total, takeover)
        uniform = policy == "uniform"
        return uniform_mask(total, count, takeover) if uniform else budget_mask(rel_l1, count, takeover)

    def digest(self) -> str:
        """Short digest of all statistics: two calibrations with the same lead to the same plans."""
        arrays = self.statistics.to_arrays()
        return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write tensors and JSON metadata as one safetensors file."""
        save_arrays(path, self.statistics.to_arrays(), SCHEMA, signature=self.signature, record=self.record)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration; raises ErtaError, with the field, if the file is missing, truncated or something else."""
        with arrays_of(path, "a calibration", (SCHEMA,), "Make it again.") as (arrays, said):
            found = cls(PairStatistics.from_arrays(arrays), said["signature"], said["record"])
        _check_loaded(found, path)
        return found


def _check_loaded(calibration: Calibration, path: str | Path) -> None:
    """Raise ErtaError, with the field, for what no calibration holds."""
    signature = Fields(path, calibration.signature, "signature")
    record = Fields(path, calibration.record, "record")
    steps = len(signature.grid("sigmas")) - 1
    branches = signature.texts("branches", 1)
    signature.text("model_class")
    signature.text("scheduler")
    signature.text("site", SITES)
    signature.text("grid", ("sigmas", "timesteps"))
    signature.wholes("latent_shape")
    for key in ("guidance_scale", "guidance_scale_2"):
        signature.number(key, 0, optional=True)
    signature.whole("takeover", 0, steps, optional=True)
    signature.whole("begin", 0, optional=True)
    record.texts("prompts", 1)
    record.texts("skipped")
    for key in ("seconds", "forward_s"):
        record.number(key, 0)
    window = record.whole("window", 1)
    shapes: dict[str, tuple[int | None, ...]] = {
        "rel_l1": (2, steps, window),
        "phi_ratio": (2, steps, window),
        "moments": (len(branches), steps, window, None),
    }
    channels = calibration.statistics.moments.count.shape[-1:]
    for name, array in calibration.statistics.to_arrays().items():
        part, _, item = name.partition(".")
        shape = (*shapes[part][:3], *channels) if part == "moments" else shapes[part]
        is_signed = item in ("mean_v", "mean_e", "s_ve")
        check_array(path, name, array, shape, least=-math.inf if is_signed else 0.0)


def _options_that_count(options: PlanOptions) -> dict[str, Any]:
    """For a plan's report: its options, None for those of a component that is off."""
    adjusts, rectifies = options.adjust_time, options.rectify
    return {
        **asdict(options),
        "phi_denominator": options.phi_denominator if adjusts else None,
        "time_form": options.time_form if adjusts else None,
        "rectifier": f"{options.rectifier}, {options.rectifier_form}" if rectifies else None,
        "rectifier_form": options.rectifier_form if rectifies else None,
    }


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str] | None = None,
    *,
    site: str = "output",
    window: int = DEFAULT_WINDOW,
    seed: int = 0,
    on_prompt: Callable[[int, Calibration], None] | None = None,
    **pipeline_kwargs: Any,
) -> Calibration:
    """Run `pipe` uncached over `prompts` and profile its residuals.

    Args:
        pipe: a diffusers pipeline with one transformer, or with two of which the second takes over at some step
            (Wan2.2); residuals of one are never compared with the other's.
        prompts: at least one, or None with `prompt_embeds=` among the rest, (prompts, tokens, width) as the pipeline takes
            them; the paper's appendix finds 20 as good as 1000.
        site: where the residual lives, `output` or `blocks` (see `erta.site`); plans inherit it.
        window: how many steps apart a pair may be; longer reuse cannot be planned.
        seed: prompt k starts from the noise of a CPU generator seeded with seed + k.
        on_prompt: called after every prompt with its number and the calibration so far (progress, saving).
        pipeline_kwargs: go to the pipeline: num_inference_steps, guidance_scale, height, width, ...

    A prompt with an output that is not finite is left out, with a warning that names prompt and step. What the pipeline runs
    of its schedule is what is planned: with `strength` below 1 a part of it, with `sigmas=` those.

    Raises ErtaError for no prompts, none left, more than one sample a prompt, guidance that cannot be told apart or changes on
    the way, and a solver of more than one forward a step; InstallError for a transformer that the site does not know.
    """
    calls = single_calls(prompts, pipeline_kwargs)
    choice_index("site", site, SITES)
    if window < 1:
        raise ErtaError(f"window must be at least 1, not {window}")
    check_bare(pipe)
    make_site(site, find_denoiser(pipe))  # raises InstallError for what this site cannot be on
    calibration: Calibration | None = None
    skipped: list[str] = []
    for index, (prompt, arguments) in enumerate(calls):
        try:
            one = _calibrate_one(pipe, prompt, latent_call(None, seed + index, arguments), seed + index, site, window)
        except NonFiniteError as error:
            skipped.append(prompt)
            named = f"prompt {index + 1} ({prompt!r}): {error}"
            if index == len(calls) - 1 and calibration is None:
                raise NonFiniteError(f"{named}; no prompt is left") from error
            warnings.warn(f"{named}; it is left out of the calibration", stacklevel=2)
        except ErtaError as error:
            raise ErtaError(f"prompt {index + 1} ({prompt!r}): {error}") from error
        else:
            calibration = one if calibration is None else calibration.merge(one)
        if calibration is not None:
            calibration = replace(calibration, record={**calibration.record, "skipped": skipped.copy()})
            if on_prompt is not None:
                on_prompt(index, calibration)
    assert calibration is not None
    return calibration


def _calibrate_one(pipe: Any, prompt: str, call: dict[str, Any], seed: int, site: str, window: int) -> Calibration:
    transformers, architecture = find_denoisers(pipe), architecture_of(find_denoiser(pipe))
    arguments = call_arguments(type(pipe), pipe, (), call)
    scale, second = guidance_scale_of(arguments), second_scale_of(arguments)
    observer = TrajectoryObserver(
        window,
        scale,
        architecture,
        eager=site != "output",
        guidance_scale_2=second,
        combines_by=combining_scale_of(arguments),
    )
    with observed(pipe, observer.observe, partial(make_site, site)) as session:
        session.show_step = observer.stepped
        started = time.perf_counter()
        pipe(**call)
        scheduler, sigmas = session.scheduler, session.sigmas
    if not len(sigmas):
        raise ErtaError(f"{type(pipe).__name__} denoised without setting a grid of steps: there is nothing to plan on")
    statistics = observer.finish(len(sigmas) - 1)
    signature = {
        **model_signature(pipe),
        **argument_signature(arguments),
        "sigmas": [float(s) for s in sigmas],
        "begin": first_index(scheduler),
        "guidance_scale": None if scale is None else float(scale),
        "latent_shape": list(observer.latent_shape or ()),
        "branches": observer.branches,
        "given_to_solver": observer.given_to_solver,
        "site": site,
        "grid": "sigmas" if has_movable_sigmas(scheduler) else "timesteps",
    }
    if 1 in transformers:
        signature["guidance_scale_2"] = None if second is None else float(second)
        signature["takeover"] = len(sigmas) - 1 if observer.takeover is None else observer.takeover
    record = {
        "prompts": [prompt],
        "skipped": [],
        "first_seed": seed,
        "window": window,
        "seconds": time.perf_counter() - started,
        "forward_s": sum(hook.transformer.seconds for hook in session.hooks.values()),
        "device": str(pipe._execution_device),
        "dtype": str(find_denoiser(pipe).dtype),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    return Calibration(statistics, signature, record)
