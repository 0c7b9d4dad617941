"""DBCache of the cache-dit package, plain and with Taylor forecasts: not run yet, since the package is an optional extra.

Site: the residual of the blocks between the first Fn, which decide, and the last Bn, which always run. Online. The arm
itself is not written: with the package missing it names the extra, and with the package there it says so too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from omegaconf import DictConfig

from erta.errors import ErtaError
from experiments.methods import Arm, GetCalibration

PACKAGE = "cache_dit"


def arm(cfg: DictConfig, pipe: Any, get_calibration: GetCalibration) -> Arm:
    """Raises ErtaError: see the module."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ErtaError(f"cache={cfg.cache.name} needs the package cache-dit, an extra: pip install cache-dit")
    raise ErtaError(f"cache={cfg.cache.name} is not here yet: cache-dit is installed, but its arm is not written")
