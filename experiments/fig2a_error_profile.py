"""`experiment=fig2a_error_profile`: the paper's Figure 2a, the relative L1 change by step, true and as TeaCache predicts it.

Claims under test: the true profile hardly depends on the prompt, so that one profile of other prompts serves; and TeaCache's
estimate, made from the input, departs from the true change more than that profile does. Decided over held-out prompts: the
correlation of the logarithms over steps with the calibration prompts' mean profile, at least `ALIKE`; and the mean absolute
error of both predictions, over the mean change.

`series`: `true` and `predicted` (prompts, steps - 1), from each step to the next, mean over guidance branches; `profile`
(steps - 1,), the mean of the true one over calibration prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from analysis import paper
from analysis.records import Measured
from erta.online import Call, online, relative_change
from erta.pipeline import latent_call
from experiments.harness.by_prompt import by_prompt
from experiments.harness.figure import finish_figure, rounded
from experiments.harness.kept import kept
from experiments.harness.setup import Setup
from experiments.methods.common.recorders import Recorder, record
from experiments.methods.teacache import coefficients_of, modulated_input
from experiments.output.provenance import describe_inputs
from experiments.output.run_folder import check_inputs
from experiments.prompts.choose import Prompt, test_prompts

ALIKE = 0.9  # a correlation from which profiles count as alike


class ChangeProfile(Recorder):
    """Relative L1 change of output and signal into each step, mean over guidance branches."""

    def begin(self, num_steps: int) -> None:
        super().begin(num_steps)
        self.seen: list[dict[str, tuple]] = [{} for _ in range(num_steps)]
        self.changes = np.zeros((2, num_steps))  # of the output, of the signal

    def computed(self, call: Call, velocity, residual) -> None:
        self.seen[call.step][call.branch] = now = (velocity, modulated_input(call))
        before = self.seen[call.step - 1].pop(call.branch, None) if call.step else None
        if before is not None:
            self.changes[:, call.step] += [relative_change(a, b) for a, b in zip(now, before, strict=True)]

    def profile(self) -> np.ndarray:
        """(2, steps - 1): of the output, and of the signal."""
        return self.changes[:, 1:] / len(self.seen[-1])


def run(cfg: DictConfig, folder: Path) -> None:
    """Measure every prompt; write `rows.jsonl`, the figure, `table.md` with the verdicts and `record.json`."""
    prompts, setup = test_prompts(cfg), Setup(cfg)
    coefficients = coefficients_of(setup)
    count = len(setup.calibration_prompts)

    def calibrated() -> dict[str, list[float]]:
        profiles = [one.profile()[0] for one in record(setup, ChangeProfile, count)]
        return {"profile": rounded(np.mean(profiles, axis=0).tolist())}

    profile = np.array(kept(setup, "change-profile", [count], calibrated)["profile"])
    check_inputs(folder, describe_inputs(setup.pipe, prompts, None))

    def measure(prompt: Prompt) -> dict[str, list[float]]:
        recorder = ChangeProfile()
        with online(setup.pipe, recorder, cfg.cache.site):
            setup.pipe(**latent_call(prompt.text, prompt.seed, setup.kwargs))
        true, signal = recorder.profile()
        return {"true": rounded(true.tolist()), "predicted": rounded(np.polyval(coefficients, signal).tolist())}

    lines = by_prompt("change by step", prompts, measure, folder / "rows.jsonl")
    true, predicted = (np.array([line[key] for line in lines]) for key in ("true", "predicted"))
    series = {"true": true.tolist(), "predicted": predicted.tolist(), "profile": profile.tolist()}
    finish_figure(cfg, folder, prompts, series, claims(true, predicted, profile))


def claims(true: np.ndarray, predicted: np.ndarray, profile: np.ndarray) -> list[Measured]:
    """What the profiles say; `true` and `predicted` (prompts, steps), `profile` (steps,)."""
    alike = np.array([np.corrcoef(np.log(one), np.log(profile))[0, 1] for one in true])
    errors = [np.abs(guess - true).mean(1) / true.mean(1) for guess in (predicted, profile[None])]
    printed = paper.figure("fig2a_error_profile")
    return [
        Measured(
            text="the error profile hardly depends on the prompt",
            paper=printed,
            ours=f"correlation with other prompts' profile {alike.mean():.3f}, least {alike.min():.3f}",
            values=rounded((alike - ALIKE).tolist()),
            unit=f"correlation above {ALIKE}",
        ),
        Measured(
            text="a profile of other prompts predicts the change better than TeaCache does from the input",
            paper=printed,
            ours=f"mean error {errors[1].mean():.1%} of the change, TeaCache's {errors[0].mean():.1%}",
            values=rounded(((errors[0] - errors[1]) * 100).tolist()),
            unit="% of the change",
        ),
    ]
