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
    from erta.calibration import Calibration, calibrate
    from erta.closed_loop import refit
    from erta.diagnosis import Decomposition, decompose, propagation_gain, reuse_error_by_channel
    from erta.errors import BudgetError, ErtaError, ExecutionMismatch, InstallError, NonFiniteError, SignatureMismatch
    from erta.interpolation import interpolate
    from erta.plan import Plan, PlanOptions, Rectification
    from erta.session import cached, install, uninstall
    from erta.trace import Trace

_HOME = {
    "BudgetError": "errors",
    "Calibration": "calibration",
    "Decomposition": "diagnosis",
    "ErtaError": "errors",
    "ExecutionMismatch": "errors",
    "InstallError": "errors",
    "NonFiniteError": "errors",
    "Plan": "plan",
    "PlanOptions": "plan",
    "Rectification": "plan",
    "SignatureMismatch": "errors",
    "Trace": "trace",
    "cached": "session",
    "calibrate": "calibration",
    "decompose": "diagnosis",
    "install": "session",
    "interpolate": "interpolation",
    "propagation_gain": "diagnosis",
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
    "InstallError",
    "NonFiniteError",
    "Plan",
    "PlanOptions",
    "Rectification",
    "SignatureMismatch",
    "Trace",
    "cached",
    "calibrate",
    "decompose",
    "install",
    "interpolate",
    "propagation_gain",
    "refit",
    "reuse_error_by_channel",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'erta' has no attribute {name!r}")
    return getattr(import_module(f"erta.{_HOME[name]}"), name)
