"""ERTACache for diffusers: calibrate once, then reuse transformer outputs at planned steps.

    calibration = erta.calibrate(pipe, prompts, num_inference_steps=50, guidance_scale=5.0)
    plan = calibration.plan(speedup=2.0)
    with erta.cached(pipe, plan) as trace:
        frames = pipe(prompt, num_inference_steps=50, guidance_scale=5.0).frames

Paper: ERTACache, arXiv 2508.21091. Names are loaded on first use: torch and diffusers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erta.branches import branches_apart
    from erta.calibration import Calibration, calibrate
    from erta.closed_loop import refit
    from erta.collapsing import collapse
    from erta.diagnosis import Decomposition, decompose, propagation_gain, reuse_error_by_channel
    from erta.errors import BudgetError, ErtaError, ExecutionMismatch, InstallError, NonFiniteError, SignatureMismatch
    from erta.fitted_scheduler import FittedScheduler
    from erta.fitting import FitOptions, fit
    from erta.interpolation import interpolate
    from erta.options import PlanOptions
    from erta.plan import Plan, Rectification
    from erta.session import cached, install, uninstall
    from erta.solver import Solver
    from erta.trace import Trace
    from erta.trajectories import Trajectories, record

_HOME = {
    "BudgetError": "errors",
    "Calibration": "calibration",
    "Decomposition": "diagnosis",
    "ErtaError": "errors",
    "ExecutionMismatch": "errors",
    "FitOptions": "fitting",
    "FittedScheduler": "fitted_scheduler",
    "InstallError": "errors",
    "NonFiniteError": "errors",
    "Plan": "plan",
    "PlanOptions": "options",
    "Rectification": "plan",
    "SignatureMismatch": "errors",
    "Solver": "solver",
    "Trace": "trace",
    "Trajectories": "trajectories",
    "branches_apart": "branches",
    "cached": "session",
    "calibrate": "calibration",
    "collapse": "collapsing",
    "decompose": "diagnosis",
    "fit": "fitting",
    "install": "session",
    "interpolate": "interpolation",
    "propagation_gain": "diagnosis",
    "record": "trajectories",
    "refit": "closed_loop",
    "reuse_error_by_channel": "diagnosis",
    "uninstall": "session",
}

__all__ = [
    "BudgetError",
    "Calibration",
    "Decomposition",
    "ErtaError",
    "ExecutionMismatch",
    "FitOptions",
    "FittedScheduler",
    "InstallError",
    "NonFiniteError",
    "Plan",
    "PlanOptions",
    "Rectification",
    "SignatureMismatch",
    "Solver",
    "Trace",
    "Trajectories",
    "branches_apart",
    "cached",
    "calibrate",
    "collapse",
    "decompose",
    "fit",
    "install",
    "interpolate",
    "propagation_gain",
    "record",
    "refit",
    "reuse_error_by_channel",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'erta' has no attribute {name!r}")
    return getattr(import_module(f"erta.{_HOME[name]}"), name)
