"""`python -m experiments.models.open_sora.convert`: one pipeline folder out of the three published checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from erta.errors import ErtaError
from experiments.models.open_sora.checkpoint import assemble, data
from experiments.models.open_sora.pipeline import OpenSoraPipeline

DTYPES = ("bfloat16", "float32", "float16")


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if the folder was written, else 1, with what is wrong in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.models.open_sora.convert",
        description="Make one folder for model.path out of the published checkpoints of Open-Sora 1.2, each in a folder of its own.",
    )
    for option, part in (
        ("--transformer", "transformer"),
        ("--vae", "autoencoder"),
        ("--text-encoder", "text_encoder"),
    ):
        parser.add_argument(option, type=Path, required=True, help=f"folder of {data()[part]['repository']}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights that are written")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists():
            raise ErtaError(f"{given.out} exists already: choose another --out")
        parts = assemble(given.transformer, given.vae, given.text_encoder, getattr(torch, given.dtype))
        OpenSoraPipeline(**parts).save_pretrained(given.out)
    except ErtaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}: use it as model=open_sora_12 model.path={given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
