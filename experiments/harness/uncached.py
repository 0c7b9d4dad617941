"""The uncached samples of a table, which all of its rows are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.harness.arm import Arm
from experiments.harness.setup import Setup
from experiments.output import ranks
from experiments.output.clips import is_whole
from experiments.output.console import progress_bar
from experiments.prompts.choose import Prompt

UNCACHED = "uncached"  # folder


def uncached_samples(setup: Setup, prompts: list[Prompt], folder: Path) -> list[np.ndarray]:
    """One a prompt, (frames, height, width, 3) in [0, 1], kept beside the rows so that a continued run compares with the same ones."""
    paths = [folder / UNCACHED / f"{index:03d}.npy" for index in range(len(prompts))]
    (folder / UNCACHED).mkdir(exist_ok=True)
    missing = ranks.share(ranks.same(lambda: [index for index, path in enumerate(paths) if not is_whole(path)]))
    if missing:
        with progress_bar() as bar:
            for index in bar.track(missing, description="uncached samples"):
                partial = paths[index].with_suffix(".partial.npy")
                np.save(partial, Arm(None, setup.kwargs).sample(setup.pipe, prompts[index]).frames)
                partial.replace(paths[index])
    ranks.wait_for_all()
    return [np.load(path, mmap_mode="c") for path in paths]
