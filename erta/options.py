"""What may be chosen of a plan and of a fit. It needs neither torch nor diffusers, so a command line knows every choice at once."""

from __future__ import annotations

from dataclasses import dataclass

from erta.errors import ErtaError, choice_index

SITES = ("output", "blocks")
POLICIES = ("threshold", "uniform")
REUSE_FORMS = ("residual", "velocity")
REL_L1_DENOMINATORS = ("ground_truth", "cached")
PHI_DENOMINATORS = ("velocity", "increment")
TIME_FORMS = ("phi", "last_step")
RECTIFIERS = ("channel", "scalar")
RECTIFIER_FORMS = ("linear", "sigmoid")
OVER_PROMPTS = ("mean", "worst")
PLACEMENTS = ("planned", "even", "best")
LOOPS = ("closed", "open", "best")
BRANCHES = ("together", "apart")
OPTION_CHOICES = {
    "policy": POLICIES,
    "rel_l1_denominator": REL_L1_DENOMINATORS,
    "phi_denominator": PHI_DENOMINATORS,
    "time_form": TIME_FORMS,
    "rectifier": RECTIFIERS,
    "rectifier_form": RECTIFIER_FORMS,
    "reuse": REUSE_FORMS,
}


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made of a calibration. The sources disagree on several formulas, so each choice is an option.

    Attributes:
        policy: `threshold`, the paper's offline policy, or `uniform`, evenly spread steps.
        rel_l1_denominator: of the policy's relative L1 change: the `ground_truth` or the `cached` residual.
        adjust_time: the paper's trajectory-aware timestep adjustment.
        phi_denominator: of phi: the `velocity` or its `increment` over a step (see `erta.statistics`).
        time_form: `phi`, or `last_step`, a control: only the longer last step that phi leads to.
        rectify: the paper's error rectification.
        rectifier: coefficients for every step and branch by `channel`, or one `scalar` pair.
        rectifier_form: `linear`, what is fitted, or `sigmoid`, the paper's formula taken literally.
        corrector_at_reused: False switches UniPC's corrector off at reused steps.
        reuse: `residual` (the paper) or `velocity`.

    Raises ErtaError for a choice that does not exist, and for options that do not go together.
    """

    policy: str = "threshold"
    rel_l1_denominator: str = "ground_truth"
    adjust_time: bool = True
    phi_denominator: str = "velocity"
    time_form: str = "phi"
    rectify: bool = True
    rectifier: str = "channel"
    rectifier_form: str = "linear"
    corrector_at_reused: bool = True
    reuse: str = "residual"

    def __post_init__(self) -> None:
        for name, choices in OPTION_CHOICES.items():
            choice_index(name, getattr(self, name), choices)
        if self.reuse == "velocity" and (self.rectify or self.adjust_time):
            raise ErtaError("adjust_time and rectify are fitted for reuse='residual': switch them off for 'velocity'")
        if self.time_form == "last_step" and not self.adjust_time:
            raise ErtaError("time_form='last_step' is a control for adjust_time, which is off")
