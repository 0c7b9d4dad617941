"""Classes of pipelines and transformers by name: our own, else those of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers

from experiments.models.open_sora.pipeline import OpenSoraPipeline
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel

OWN: dict[str, Any] = {made.__name__: made for made in (OpenSoraPipeline, STDiT3Transformer3DModel)}


def class_named(name: str) -> Any:
    """The class. Raises AttributeError for a name that neither we nor diffusers have."""
    return OWN[name] if name in OWN else getattr(diffusers, name)
