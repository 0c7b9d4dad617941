"""Reads the published checkpoints of Open-Sora 1.2 by a table of their tensors (`published.yaml`).

Every tensor is used once and none is left over; a checkpoint of another layout, or half of one, is refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, T5EncoderModel

from erta.errors import ErtaError
from experiments.models.open_sora.autoencoder import AutoencoderKLOpenSora
from experiments.models.open_sora.sizes import rectified_flow
from experiments.models.open_sora.transformer import STDiT3Transformer3DModel, TimeRotation

FILE = Path(__file__).with_name("published.yaml")
EARLIER = re.compile(r"blocks\.\d+\.|.*\.attn_temp\.")  # names that Open-Sora 1.0 and 1.1 have, and 1.2 has not
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A published tensor: its name in the model here, and its shape."""

    name: str
    shape: Shape


@cache
def data() -> dict[str, Any]:
    """All of the file."""
    return OmegaConf.to_container(OmegaConf.load(FILE))  # type: ignore[return-value]


def table(
    part: str, model: nn.Module, sizes: Mapping[str, int] | None = None, runs: Mapping[str, Any] | None = None
) -> dict[str, Entry]:
    """Every published tensor of `part` (transformer or autoencoder) by its name there.

    Args:
        model: of that part, for the tensors whose names and shapes are diffusers' own.
        sizes, runs: in place of the file's, for smaller models of the same layout.
    """
    about = data()[part]
    sizes, runs = {**about["sizes"], **(sizes or {})}, {**about["runs"], **(runs or {})}

    def entries(published: str, own: str, shape: Sequence[int | str], values: Mapping[str, int]) -> dict[str, Entry]:
        whole = tuple(size if isinstance(size, int) else values[size] for size in shape)
        names = re.findall(r"\{(\w+)\}", published)
        ways = [range(run) if isinstance(run, int) else run for run in (runs[name] for name in names)]
        choices = [dict(zip(names, way, strict=True)) for way in itertools.product(*ways)]
        return {published.format(**choice): Entry(own.format(**choice), whole) for choice in choices}

    found: dict[str, Entry] = {}
    for published, (own, shape) in about["tensors"].items():
        found |= entries(published, own, shape, sizes)
    for published, own, inside, outside in about.get("blocks", []):
        channels = {"in": sizes[inside], "out": sizes[outside]}
        for name, shape in about["block"].items():
            if not name.startswith("conv3.") or channels["in"] != channels["out"]:
                found |= entries(f"{published}.{name}", f"{own}.{name}", shape, channels)
    for there, here in about.get("same", {}).items():
        for name, tensor in model.state_dict().items():
            if name.startswith(here):
                found[there + name.removeprefix(here)] = Entry(name, tuple(tensor.shape))
    return found


def load_into(model: nn.Module, folder: Path, part: str, dtype: torch.dtype, wanted: Mapping[str, Entry]) -> None:
    """Put the tensors of a published checkpoint into a model without weights (on the meta device).

    Raises ErtaError, with the checkpoint's name, for files that are missing or damaged, and for whatever `check` refuses.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ErtaError(f"{folder} has no *.safetensors: download {data()[part]['repository']} there")
    state: dict[str, torch.Tensor] = {}
    try:
        shapes: dict[str, Shape] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        check(shapes, part, wanted, folder)
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    state[wanted[name].name] = opened.get_tensor(name).to(dtype)
    except SafetensorError as error:
        raise ErtaError(f"{folder} is damaged or truncated ({error}). Copy it again.") from error
    if part == "transformer":
        state["rope.freqs"] = state.get("rope.freqs", TimeRotation(model.config.attention_head_dim).freqs).float()
    model.load_state_dict(state, assign=True)
    model.eval()


def check(found: Mapping[str, Shape], part: str, wanted: Mapping[str, Entry], where: Path) -> None:
    """Raise ErtaError for tensors of an earlier version, strange ones, missing ones, and ones of another shape."""
    about = data()[part]
    earlier = next((name for name in found if EARLIER.match(name)), None)
    if earlier is not None and part == "transformer":
        raise ErtaError(
            f"{where} is a checkpoint of Open-Sora 1.0 or 1.1 (it has {earlier}): take {about['repository']}"
        )
    strange = sorted(set(found) - set(wanted))
    if strange:
        raise ErtaError(
            f"{where} is no {part} of Open-Sora 1.2, which has no {strange[0]}{_and_more(strange)}: take {about['repository']}"
        )
    missing = sorted(set(wanted) - set(found) - set(about.get("may_be_missing", [])))
    if missing:
        raise ErtaError(f"{where} is not whole: it lacks {missing[0]}{_and_more(missing)}. Copy it again.")
    for name, shape in found.items():
        if shape != wanted[name].shape:
            raise ErtaError(
                f"{where} is a model of another size: {name} has the shape {shape}, and Open-Sora 1.2's is "
                f"{wanted[name].shape}"
            )


def assemble(transformer: Path, vae: Path, text_encoder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The parts of an `OpenSoraPipeline` from folders of the three published checkpoints.

    Raises ErtaError for a folder that is missing, or that does not hold what it should.
    """
    for folder, part in ((transformer, "transformer"), (vae, "autoencoder"), (text_encoder, "text_encoder")):
        if not folder.is_dir():
            raise ErtaError(f"there is no folder {folder}: download {data()[part]['repository']} there")
    with torch.device("meta"):
        models = {"transformer": STDiT3Transformer3DModel(), "vae": AutoencoderKLOpenSora()}
    load_into(models["transformer"], transformer, "transformer", dtype, table("transformer", models["transformer"]))
    load_into(models["vae"], vae, "autoencoder", dtype, table("autoencoder", models["vae"]))
    return {**models, **_text_parts(text_encoder, dtype), "scheduler": rectified_flow()}


def _text_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    about = data()["text_encoder"]
    try:
        encoder = T5EncoderModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ErtaError(f"{folder} does not load as the T5 of {about['repository']}: {reason}") from error
    if encoder.config.d_model != about["width"]:
        raise ErtaError(
            f"{folder} is a T5 of width {encoder.config.d_model}, and Open-Sora 1.2 needs {about['width']}: take "
            f"{about['repository']}"
        )
    return {"text_encoder": encoder.eval(), "tokenizer": tokenizer}


def from_hub(transformer: str, dtype: torch.dtype, revision: str | None) -> dict[str, Any]:
    """`assemble` on what the hub's local cache holds, or the hub. Raises OSError for what is in neither.

    Args:
        transformer: name of its checkpoint on the hub; revision: of that one. The other two are the published ones.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.bin", "*.model"]
    vae, text = (data()[part]["repository"] for part in ("autoencoder", "text_encoder"))
    transformer_folder = Path(snapshot_download(transformer, revision=revision, allow_patterns=wanted))
    vae_folder, text_folder = (Path(snapshot_download(name, allow_patterns=wanted)) for name in (vae, text))
    return assemble(transformer_folder, vae_folder, text_folder, dtype)


def how_to_get() -> str:
    """What to download, and what to do with it."""
    names = [data()[part]["repository"] for part in ("transformer", "autoencoder", "text_encoder")]
    folders = [name.split("/")[1] for name in names]
    fetch = ", ".join(f"`hf download {name} --local-dir {folder}`" for name, folder in zip(names, folders, strict=True))
    return (
        f"Download them: {fetch}; then `python -m experiments.models.open_sora.convert --transformer {folders[0]} --vae {folders[1]} "
        f"--text-encoder {folders[2]} --out open_sora_12` and model.path=open_sora_12"
    )


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
