"""A plan: what a cached run executes. Static, so nothing is decided on the device while it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from erta.errors import ErtaError, choice_index
from erta.files import replacing
from erta.grid import check_grid, computed_sigmas
from erta.loading import Fields, check_readable
from erta.options import RECTIFIER_FORMS, REUSE_FORMS, SITES
from erta.policy import Mask, segments

SCHEMA = "erta.plan/1"


@dataclass(frozen=True)
class Rectification:
    """`v_hat = gain * v_cached + offset` for each step, branch and channel: arrays (num_steps, branches, channels).

    With `form="sigmoid"` the paper's formula is evaluated literally: `v_hat = v_cached - sigmoid(K v_cached + B)`,
    whose linearisation the two arrays are.
    """

    gain: np.ndarray
    offset: np.ndarray
    form: str = "linear"


@dataclass(frozen=True)
class Plan:
    """Computed-step mask, time grid and predictor coefficients of a run.

    Attributes:
        mask: True where the transformer is run, one entry a step.
        sigmas: the grid that is integrated, float32 (num_steps + 1,).
        nominal_sigmas: the scheduler's own grid that the plan was made for; None: any grid of that length.
        site: where the residual lives, `output` or `blocks` (see `erta.site`).
        reuse: what a reused step returns before rectification: `residual` (x + r, the paper) or `velocity`.
        rectification: coefficients, or None.
        corrector_at_reused: whether a multistep solver may correct with a reused output (UniPC).
        branches: guidance branches the plan knows, in the order of the rectification's axis; None: any.
        latent_shape: of the transformer's input without the batch axis; None: any.
        guidance_scale: that the plan was made for; None: any.
        guidance_scale_2: the same of the second transformer, if there is one.
        takeover: the step from which a second transformer runs: 0 if always, num_steps if never; None: there is
            one transformer, or it is not known when the second takes over.
        signature: of the calibration, None if there was none.
        report: how the plan came about (threshold or budget, its errors), for the record.
    """

    mask: Mask
    sigmas: np.ndarray
    nominal_sigmas: np.ndarray | None = None
    site: str = "output"
    reuse: str = "residual"
    rectification: Rectification | None = None
    corrector_at_reused: bool = True
    branches: tuple[str, ...] | None = None
    latent_shape: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    takeover: int | None = None
    signature: dict[str, Any] | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.mask or not self.mask[0]:
            raise ErtaError("a plan must compute its first step: there is nothing to reuse before it")
        if len(self.sigmas) != len(self.mask) + 1:
            raise ErtaError(f"{len(self.mask)} steps need {len(self.mask) + 1} sigmas, not {len(self.sigmas)}")
        if self.takeover is not None and not 0 <= self.takeover <= len(self.mask):
            raise ErtaError(f"the second transformer cannot take over at step {self.takeover} of {len(self.mask)}")
        if not all(self.mask[part.start] for part in segments(len(self.mask), self.takeover)):
            raise ErtaError(
                f"a plan must compute step {self.takeover}, the second transformer's first: a residual of one "
                "transformer must not stand in for the other's"
            )
        choice_index("site", self.site, SITES)
        choice_index("reuse", self.reuse, REUSE_FORMS)
        if self.site != "output" and self.reuse != "residual":
            raise ErtaError(f"reuse={self.reuse!r} is of the transformer's output: use site=output")
        check_grid(np.asarray(self.sigmas, dtype=np.float32))

    @property
    def num_steps(self) -> int:
        return len(self.mask)

    @property
    def begin(self) -> int:
        """Where the steps begin in the scheduler's grid: not 0 for a part of a schedule (image-to-image)."""
        return int((self.signature or {}).get("begin") or 0)

    @property
    def num_computed(self) -> int:
        return sum(self.mask)

    def is_reused(self, step: int) -> bool:
        """Whether there is such a step, and it is not computed."""
        return step < self.num_steps and not self.mask[step]

    def grid_only(self) -> Plan:
        """`plan_grid`: the same solver on this plan's computed sigmas, every one computed, no cache.

        Raises ErtaError for a part of a schedule: the pipeline cuts its steps itself.
        """
        if self.begin:
            raise ErtaError("a plan for a part of a schedule (strength below 1) has no grid of its own")
        return Plan(
            mask=(True,) * self.num_computed,
            sigmas=computed_sigmas(self.sigmas, self.mask),
            branches=self.branches,
            latent_shape=self.latent_shape,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            takeover=None if self.takeover is None else sum(self.mask[: self.takeover]),
            signature=self.signature and {**self.signature, "sigmas": None, "takeover": None},
            report={**self.report, "grid_only_of_steps": self.num_steps},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: what `plan.json` holds."""
        rect = self.rectification
        return {
            "schema": SCHEMA,
            "steps": {"total": self.num_steps, "computed": self.num_computed, "mask": [int(m) for m in self.mask]},
            "sigmas": [float(s) for s in self.sigmas],
            "nominal_sigmas": None if self.nominal_sigmas is None else [float(s) for s in self.nominal_sigmas],
            "site": self.site,
            "reuse": self.reuse,
            "corrector_at_reused": self.corrector_at_reused,
            "rectification": rect and {"form": rect.form, "gain": rect.gain.tolist(), "offset": rect.offset.tolist()},
            "branches": self.branches and list(self.branches),
            "latent_shape": self.latent_shape and list(self.latent_shape),
            "guidance_scale": self.guidance_scale,
            "guidance_scale_2": self.guidance_scale_2,
            "takeover": self.takeover,
            "signature": self.signature,
            "report": self.report,
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; raises ErtaError, with the field, if the file is not a whole plan."""
        check_readable(path, "a plan")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ErtaError(f"cannot read a plan from {path}: it is not JSON ({error})") from error
        fields = Fields(path, data)
        if data.get("schema") != SCHEMA:
            raise ErtaError(f"{path} is not a plan of this version ({data.get('schema')!r}, not {SCHEMA!r})")
        mask = fields.inside("steps").zeros_and_ones("mask")
        sigmas = fields.grid("sigmas")
        nominal = None if fields.take("nominal_sigmas") is None else fields.grid("nominal_sigmas")
        branches = None if fields.take("branches") is None else tuple(fields.texts("branches", 1))
        if nominal is not None and (
            len(nominal) != len(sigmas) or nominal[0] != sigmas[0] or nominal[-1] != sigmas[-1]
        ):
            raise fields.wrong("sigmas", "as many as nominal_sigmas, from the same first to the same last one")
        shape = fields.wholes("latent_shape", optional=True)
        report, signature = fields.take("report"), fields.take("signature")
        if not isinstance(report, dict):
            raise fields.wrong("report", "an object of fields", report)
        try:
            return cls(
                mask=mask,
                sigmas=sigmas,
                nominal_sigmas=nominal,
                site=fields.text("site", SITES),
                reuse=fields.text("reuse", REUSE_FORMS),
                rectification=_loaded_rectification(fields, len(mask), branches),
                corrector_at_reused=fields.flag("corrector_at_reused"),
                branches=branches,
                latent_shape=None if shape is None else tuple(shape),
                guidance_scale=fields.number("guidance_scale", 0, optional=True),
                guidance_scale_2=fields.number("guidance_scale_2", 0, optional=True),  # old plans were written without
                takeover=fields.whole("takeover", 0, len(mask), optional=True),
                signature=None if signature is None else fields.inside("signature").plain(),
                report=report,
            )
        except ErtaError as error:
            raise error if str(path) in str(error) else ErtaError(f"{path}: {error}") from error


def _loaded_rectification(fields: Fields, steps: int, branches: tuple[str, ...] | None) -> Rectification | None:
    if fields.take("rectification") is None:
        return None
    rect = fields.inside("rectification")
    shape = (steps, None if branches is None else len(branches), None)
    gain, offset = rect.array("gain", shape), rect.array("offset", shape)
    if gain.shape != offset.shape:
        raise rect.wrong("offset", f"of the shape of gain, {gain.shape}")
    return Rectification(gain, offset, rect.text("form", RECTIFIER_FORMS))
