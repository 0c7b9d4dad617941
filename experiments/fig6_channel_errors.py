"""`experiment=fig6_channel_errors`: the paper's Figure 6, how reuse errors are spread over channels, dynamic and static prompts.

Claim under test: the spread over channels is the same for dynamic and for static prompts, which lets the rectifier's K and B be
fixed (reviewers doubted it for dynamic scenes). Whether a prompt is dynamic is measured: the half whose uncached clips change
more from frame to frame. Decided over prompts: the correlation of the logarithms over channels with the mean of the *other*
half, at least `ALIKE`.

`series`: `static` and `dynamic` (prompts, channels), the mean absolute error of reused outputs before rectification;
`motion` (prompts,), the mean absolute change between frames in grey levels of [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

import erta
from analysis import paper
from analysis.records import Measured
from erta.errors import ErtaError
from experiments.harness.arm import Arm, make_arm
from experiments.harness.by_prompt import by_prompt
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.setup import Setup
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs
from experiments.prompts.choose import Prompt, test_prompts

ALIKE = 0.9  # a correlation from which spreads count as alike


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure every prompt; write `rows.jsonl`, the figure, `table.md` with the verdict and `record.json`."""
    if cfg.model.num_frames is None:
        raise ErtaError(
            f"fig6_channel_errors is about motion, and model={cfg.model.name} makes images: take a video model"
        )
    prompts, setup = test_prompts(cfg), Setup(cfg)
    if len(prompts) < 4:
        raise ErtaError(f"two halves of prompts need at least 4 prompts, not bench.num_prompts={len(prompts)}")
    arm = make_arm(setup)
    if arm.plan is None:
        raise ErtaError(f"cache={cfg.cache.name} has no plan, whose errors could be looked at: take cache=ertacache")
    plan = arm.plan
    check_inputs(folder, describe_inputs(setup.pipe, prompts, arm.calibration))

    def measure(prompt: Prompt) -> dict[str, Any]:
        errors = erta.reuse_error_by_channel(setup.pipe, plan, prompt.text, seed=prompt.seed, **setup.kwargs)
        frames = Arm(None, setup.kwargs).sample(setup.pipe, prompt).frames
        return {"errors": rounded(errors.tolist()), "motion": float(np.abs(np.diff(frames, axis=0)).mean())}

    lines = by_prompt("errors by channel", prompts, measure, folder / "rows.jsonl")
    motion = np.array([line["motion"] for line in lines])
    still = motion <= np.median(motion)
    errors = np.array([line["errors"] for line in lines])
    series = {"static": errors[still].tolist(), "dynamic": errors[~still].tolist(), "motion": rounded(motion.tolist())}
    finish_figure(cfg, folder, prompts, series, [claim(errors, still)])


def claim(errors: np.ndarray, still: np.ndarray) -> Measured:
    """What the errors (prompts, channels) say, with `still` (prompts,) true for the static half."""
    logs = np.log(errors)
    means = {half: logs[still == half].mean(0) for half in (True, False)}
    alike = np.array([np.corrcoef(one, means[not half])[0, 1] for one, half in zip(logs, still.tolist(), strict=True)])
    return Measured(
        text="errors are spread over channels in the same way for dynamic and for static prompts",
        paper=paper.figure("fig6_channel_errors"),
        ours=f"correlation with the other half's spread {alike.mean():.3f}, least {alike.min():.3f}",
        values=rounded((alike - ALIKE).tolist()),
        unit=f"correlation above {ALIKE}",
    )
