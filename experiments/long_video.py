"""`experiment=long_video`: speed-up against the number of frames and the size (reviewers asked; nothing is printed).

Claim under test, ours: longer and larger samples keep the speed-up. For each size of `long_video.frames` and
`long_video.sides`, ERTACache is calibrated anew and timed in turns with the uncached run, after a warm-up. Decided over pairs:
at least `KEPT` of the speed-up at the model's own size. PSNR is shown too; an embedded model was trained at one size, so what
it draws at others means little.

`series.sizes`: for each its frames, height, width, forwards, the speed-ups of the pairs, what as many forwards can reach
(`possible`), and PSNR in dB, None where samples are identical.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from analysis.records import Measured
from erta.errors import ErtaError
from experiments.bench.fidelity import psnr_db
from experiments.harness.arm import Arm, make_arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.figure import finish_figure
from experiments.harness.generate import needed_s
from experiments.harness.setup import Setup
from experiments.output import console
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs
from experiments.prompts.choose import Prompt, test_prompts

KEPT = 0.95
SIDE = 16  # pixels: sides are multiples of it


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure every size; write a line a pair, the figure, `table.md` with the verdicts and `record.json`."""
    prompts, base = test_prompts(cfg), Setup(cfg)
    check_inputs(folder, describe_inputs(base.pipe, prompts, None))
    sizes = []
    for frames, height, width in sizes_of(cfg):
        name = "x".join(str(part) for part in (frames, height, width) if part is not None)
        sized = cfg.copy()
        sized.model.num_frames, sized.model.height, sized.model.width = frames, height, width
        setup = Setup(sized, base.pipe)
        arm = make_arm(setup)
        lines = by_prompt(name, prompts, _pair(setup, arm), folder / f"{name}.jsonl")
        sizes.append(
            {
                "frames": frames or 1,
                "height": height,
                "width": width,
                **summary(lines, cfg.model.num_inference_steps, arm.num_steps),
            }
        )
        console.note(f"{name}: {np.median(sizes[-1]['speedups']):.2f}x, possible {sizes[-1]['possible']:.2f}x")
    finish_figure(cfg, folder, prompts, {"sizes": sizes}, claims(sizes))


def sizes_of(cfg: DictConfig) -> list[tuple[int | None, int, int]]:
    """Frames, height and width: the model's own, then more frames, then larger sides. Raises ErtaError for factors below 1."""
    own, model = cfg.long_video, cfg.model
    if any(factor < 1 for factor in (*own.frames, *own.sides)):
        raise ErtaError("long_video.frames and long_video.sides are factors ≥ 1 of the model's own size")
    longer = [] if model.num_frames is None else [(model.num_frames - 1) * factor + 1 for factor in own.frames]
    larger = [[round(side * factor / SIDE) * SIDE for side in (model.height, model.width)] for factor in own.sides]
    found = [
        (model.num_frames, model.height, model.width),
        *((frames, model.height, model.width) for frames in longer),
        *((model.num_frames, height, width) for height, width in larger),
    ]
    return list(dict.fromkeys(found))


def _pair(setup: Setup, arm: Arm) -> Any:
    """What times one prompt without and with the cache, in an order that changes from prompt to prompt."""
    uncached, turn = Arm(None, setup.kwargs), [0]

    def measure(prompt: Prompt) -> dict[str, Any]:
        if turn[0] == 0:  # not measured: the first run of a size takes longer
            Arm(None, {**setup.kwargs, "num_inference_steps": 2}).sample(setup.pipe, prompt)
        turn[0] += 1
        sides = {"uncached": uncached, "cached": arm}
        order = list(sides) if turn[0] % 2 else list(sides)[::-1]
        made = {name: sides[name].sample(setup.pipe, prompt) for name in order}
        times = {
            name: {"denoise_s": one.denoise_s, "forward_s": one.forward_s, "forwards": one.forwards}
            for name, one in made.items()
        }
        return {**times, "psnr_db": psnr_db(made["cached"].frames, made["uncached"].frames)}

    return measure


def summary(lines: list[dict[str, Any]], steps: int, cached_steps: int) -> dict[str, Any]:
    """Of the pairs of one size: speed-ups, forwards, what they can reach at most, PSNR."""
    full, fewer = (float(np.mean([line[side]["forwards"] for line in lines])) for side in ("uncached", "cached"))
    rest_s = float(np.median([line["uncached"]["denoise_s"] - line["uncached"]["forward_s"] for line in lines]))
    solver_s = max(rest_s, 0.0) * cached_steps / steps
    denoise_s = float(np.median([line["uncached"]["denoise_s"] for line in lines]))
    cached = [line["cached"] for line in lines]
    needed = np.median([needed_s(one["denoise_s"], one["forward_s"], 0.0, solver_s) for one in cached])
    return {
        "forwards": [full, fewer],
        "speedups": [line["uncached"]["denoise_s"] / line["cached"]["denoise_s"] for line in lines],
        "possible": denoise_s / float(needed),
        "denoise_s": denoise_s,
        "psnr_db": [line["psnr_db"] for line in lines],
    }


def claims(sizes: list[dict[str, Any]]) -> list[Measured]:
    """Whether each larger size keeps the speed-up of the first."""
    first = np.array(sizes[0]["speedups"])
    found = []
    for size in sizes[1:]:
        speedups = np.array(size["speedups"])
        found.append(
            Measured(
                text=f"the speed-up is kept at {size['frames']} frames of {size['height']}×{size['width']}",
                paper="",
                ours=f"{np.median(speedups):.2f}× against {np.median(first):.2f}×",
                values=(speedups / first - KEPT).tolist(),
                unit=f"of the speed-up, above {KEPT}",
            )
        )
    return found
