"""The methods that there are: the files of `conf/cache/`, and what each says of itself under `about`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from erta.errors import ErtaError
from experiments.harness.config import CONF, CacheConfig

FOLDER = CONF / "cache"


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def configuration(name: str) -> DictConfig:
    """What `cache=name` sets, with all defaults. Raises ErtaError for a method that does not exist."""
    if name not in names():
        raise ErtaError(f"there is no such method. Choose from {', '.join(names())}")
    return OmegaConf.merge(OmegaConf.structured(CacheConfig), OmegaConf.load(FOLDER / f"{name}.yaml"))  # type: ignore[return-value]


def facts(name: str) -> DictConfig:
    """What a method says of itself, a `MethodFacts`. Raises ErtaError for a method that does not exist."""
    return configuration(name).about
