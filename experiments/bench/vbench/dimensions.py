"""The sixteen dimensions of VBench 0.1.5: what each one reads, and why one cannot be evaluated here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erta.errors import ErtaError, choice_index

SUITES = ("custom", "standard")
ALL = "all"
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_BERT = "models--bert-base-uncased"
BERT_TOKENIZER = ("vocab.txt",)
BERT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Dimension:
    """What one dimension reads.

    Attributes:
        weights: files and folders below `cache_dir`, as the package names them.
        bert: of the hub's bert-base-uncased, groups of files of which one each has to be in the hub's cache.
        any_prompt: it scores clips of any prompt; the others need what VBench notes about its own prompts.
    """

    weights: tuple[str, ...] = ()
    bert: tuple[tuple[str, ...], ...] = ()
    any_prompt: bool = True


DIMENSIONS: dict[str, Dimension] = {
    "subject_consistency": Dimension(
        ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main/hubconf.py")
    ),
    "background_consistency": Dimension(("clip_model/ViT-B-32.pt",)),
    "temporal_flickering": Dimension(),
    "motion_smoothness": Dimension(("amt_model/amt-s.pth",)),
    "dynamic_degree": Dimension(("raft_model/models/raft-things.pth",)),
    "aesthetic_quality": Dimension(("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")),
    "imaging_quality": Dimension(("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
    "object_class": Dimension(_GRIT, (BERT_TOKENIZER,), any_prompt=False),
    "multiple_objects": Dimension(_GRIT, (BERT_TOKENIZER,), any_prompt=False),
    "human_action": Dimension(("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",)),
    "color": Dimension(_GRIT, (BERT_TOKENIZER,), any_prompt=False),
    "spatial_relationship": Dimension(_GRIT, (BERT_TOKENIZER,), any_prompt=False),
    "scene": Dimension(("caption_model/tag2text_swin_14m.pth",), (BERT_TOKENIZER, BERT_WEIGHTS), any_prompt=False),
    "appearance_style": Dimension(("clip_model/ViT-B-32.pt",), any_prompt=False),
    "temporal_style": Dimension(_VICLIP),
    "overall_consistency": Dimension(_VICLIP),
}


def requested(value: Any) -> list[str]:
    """The dimensions that `bench.dimensions` names: a list, one name, or `all`; each once.

    Raises ErtaError for a name that VBench does not have.
    """
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [str(value)]
    unknown = [str(name) for name in names if name not in DIMENSIONS and name != ALL]
    if unknown:
        raise ErtaError(
            f"bench.dimensions: VBench has no dimension {', '.join(unknown)}.\n"
            f"Choose from {', '.join(DIMENSIONS)}, or all of them with bench.dimensions=all"
        )
    return list(DIMENSIONS) if ALL in names else list(dict.fromkeys(names))


def validate(cfg: Any) -> None:
    """Raise ErtaError for values under `bench` that have the right type but no meaning for VBench."""
    names = requested(cfg.bench.dimensions)
    choice_index("bench.suite", cfg.bench.suite, SUITES)
    if cfg.bench.videos_per_prompt < 1:
        raise ErtaError(f"bench.videos_per_prompt must be at least 1, not {cfg.bench.videos_per_prompt}")
    if cfg.bench.suite != "standard":
        return
    if cfg.bench.prompts is not None:
        raise ErtaError("VBench's standard suite has its own prompts: use bench=vbench for those of bench.prompts")
    if cfg.model.num_frames is None:
        raise ErtaError(f"VBench reads videos, and model={cfg.model.name} makes images")
    if not names:
        raise ErtaError("bench.dimensions is empty: VBench's standard suite needs at least one dimension")


def cache_dir() -> Path:
    """Where VBench keeps its weights. Raises ErtaError if VBENCH_CACHE_DIR names something else than a folder."""
    named = os.environ.get("VBENCH_CACHE_DIR")
    folder = Path(named or "~/.cache/vbench").expanduser()
    if named and not folder.is_dir():
        raise ErtaError(f"VBENCH_CACHE_DIR={named} is not a folder: it should hold VBench's weight files")
    return folder


def missing_files(name: str) -> list[str]:
    """The files that a dimension reads and that are not there, as full paths. A file of no bytes is not there."""
    dimension = DIMENSIONS[name]
    absent = [str(path) for path in (cache_dir() / file for file in dimension.weights) if not _has_content(path)]
    if dimension.bert:
        from huggingface_hub.constants import HF_HUB_CACHE

        snapshots = Path(HF_HUB_CACHE) / _BERT / "snapshots"
        for choices in dimension.bert:
            if not any(_has_content(path) for file in choices for path in snapshots.glob(f"*/{file}")):
                absent.append(str(snapshots / "*" / " or ".join(choices)))
    return absent


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def why_not(names: list[str], suite: str, failed_imports: dict[str, str]) -> dict[str, str]:
    """For each dimension that cannot be evaluated, the reason: its prompts, then files, then Python modules.

    Args:
        failed_imports: what the worker's interpreter says of the dimensions whose code it cannot import.
    """
    reasons = {}
    for name in names:
        if suite == "custom" and not DIMENSIONS[name].any_prompt:
            reasons[name] = "needs VBench's own prompts: bench=vbench_standard"
            continue
        absent = missing_files(name)
        found = [f"weights not found: {', '.join(absent)}"] if absent else []
        found += [failed_imports[name]] if name in failed_imports else []
        if found:
            reasons[name] = "; ".join(found)
    return reasons
