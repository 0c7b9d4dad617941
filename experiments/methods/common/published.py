"""Published constants, each with the model that it was measured on and where it is from (`published.yaml`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from erta.errors import ErtaError
from erta.pipeline import find_denoiser

FILE = Path(__file__).with_name("published.yaml")
CHOICES = ("calibrated", "published")


def published(method: str, pipe: Any, num_steps: int, file: Path = FILE) -> dict[str, Any]:
    """The entry of a method whose model is the pipeline's: known by its class and layers, not by a name or path.

    Raises ErtaError if there is none, or it is for another number of steps.
    """
    transformer = find_denoiser(pipe)
    here: dict[str, Any] = {"class": type(transformer).__name__, **dict(transformer.config)}
    known: list[dict[str, Any]] = OmegaConf.to_container(OmegaConf.load(file))[method]  # type: ignore[index,call-overload,assignment]
    fitting = [entry for entry in known if all(here.get(key) == value for key, value in entry["model"].items())]
    if not fitting:
        names = ", ".join(entry["name"] for entry in known)
        layers = {key: here.get(key) for key in ("num_layers", "num_attention_heads")}
        raise ErtaError(
            f"the published constants of {method} are for {names}, not for this {here['class']} ({layers}): use "
            "cache.options.constants=calibrated"
        )
    (entry,) = fitting
    if entry["num_steps"] != num_steps:
        raise ErtaError(
            f"the published constants of {method} for {entry['name']} are for {entry['num_steps']} steps, not "
            f"{num_steps}: use cache.options.constants=calibrated"
        )
    return entry
