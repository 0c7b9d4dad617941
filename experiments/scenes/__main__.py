"""`python -m experiments.scenes FILE.png`: pictures of both worlds side by side, each row from one caption."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.scenes import render, sample_scenes
from experiments.scenes.attributes import WORLDS

ROWS, COLUMNS, MAGNIFIED, EDGE_PX = 6, 5, 2, 2


def sheet(seed: int) -> np.ndarray:
    """(height, width, 3) in [0, 1]: the plain world on the left, the rich one on the right."""
    scenes, rng = sample_scenes(ROWS, "train", seed, picture=True), np.random.default_rng(seed)
    sides = []
    for world in WORLDS:
        rows = [[framed(render(replace(scene, world=world), rng)[0]) for _ in range(COLUMNS)] for scene in scenes]
        sides.append(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    return np.concatenate([sides[0], np.ones((len(sides[0]), 6 * EDGE_PX, 3)), sides[1]], axis=1)


def framed(picture: np.ndarray) -> np.ndarray:
    """The picture, magnified, with a white edge."""
    large = picture.repeat(MAGNIFIED, axis=0).repeat(MAGNIFIED, axis=1)
    return np.pad(large, ((EDGE_PX, EDGE_PX), (EDGE_PX, EDGE_PX), (0, 0)), constant_values=1)


def main(arguments: list[str]) -> int:
    """Write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scenes", description=__doc__)
    parser.add_argument("file", type=Path, help="a .png file that is written")
    parser.add_argument("--seed", type=int, default=0, help="other captions")
    asked = parser.parse_args(arguments)
    if asked.seed < 0:
        parser.error(f"--seed must not be negative: {asked.seed}")
    try:
        Image.fromarray((sheet(asked.seed) * 255).round().astype(np.uint8)).save(asked.file)
    except (OSError, ValueError) as error:
        print(f"{asked.file} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"written: {asked.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
