"""The rows of a comparison as tables, as Markdown and as points of its figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.intervals import Interval, mean_psnr, paired_interval
from experiments.harness.rows import Row, interval_text
from experiments.output.run_folder import environment, markdown

REFERENCE = "ertacache"
NO_BUDGET = "none"  # one row, whatever the budget
SPEEDUP = "speedup"
COMPARED = {"psnr_db": "+.2f", "ssim": "+.4f", "lpips": "+.4f", "scene": "+.1%", SPEEDUP: "+.2f"}
COLUMNS = (
    "method",
    "forwards",
    "speed-up, measured",
    "PSNR dB",
    f"against {REFERENCE} (95 %)",
    "SSIM",
    "LPIPS",
    "scene, all",
    "cache bytes",
    "calibration s",
)
DIFFERENCES = ("method", "PSNR dB", "SSIM", "LPIPS", "scene, all", "speed-up")


@dataclass
class Outcome:
    """A row's samples in the order of the prompts, or why there are none."""

    row: Row
    samples: list[dict[str, Any]] = field(default_factory=list)
    calibration_s: float = 0.0
    reason: str | None = None
    ran_on: str | None = None
    commit: str | None = None

    def mean(self, key: str) -> float | None:
        """Mean of what the samples know of `key`."""
        known = [one[key] for one in self.samples if one[key] is not None]
        return float(np.mean(known)) if known else None

    @property
    def ratios(self) -> list[float | None]:
        """Uncached over cached seconds of denoising, by sample; None where no pair was timed in turns."""
        return [one["uncached_s"] and one["uncached_s"] / one["denoise_s"] for one in self.samples]

    @property
    def speedup(self) -> float | None:
        """Median of the ratios."""
        known = [ratio for ratio in self.ratios if ratio is not None]
        return float(np.median(known)) if known else None

    def gain(self, key: str, over: Outcome) -> Interval | None:
        """Paired difference of `key` to another row, 95 % over prompts; None where a sample does not know it.

        That of the speed-up is over the prompts on which both rows were timed.
        """
        pairs: list[tuple[Any, Any]]
        if key == SPEEDUP:
            pairs = [(a, b) for a, b in zip(self.ratios, over.ratios, strict=True) if a is not None and b is not None]
        else:
            pairs = [(a[key], b[key]) for a, b in zip(self.samples, over.samples, strict=True)]
        if not pairs or any(value is None for pair in pairs for value in pair):
            return None
        return paired_interval(np.array([float(a) - float(b) for a, b in pairs]))

    def reused_nothing(self, full: float | None) -> bool:
        """Whether as many forwards were made as without a cache, `full`."""
        if self.row.computed is None or full is None or not self.samples:
            return False
        return min(one["forwards"] for one in self.samples) > full - 1e-3


def tabulate(outcomes: list[Outcome], uncached_scene: float | None = None) -> dict[int, list[list[str]]]:
    """A table for each budget, best PSNR first, below the uncached run and the row without a budget (the noise floor).

    Args:
        uncached_scene: share of the uncached samples that show what was asked for; None if it is not known.
    """
    tables = {}
    for count in sorted({o.row.computed for o in outcomes if o.row.computed is not None}, reverse=True):
        here = in_order(outcomes, count)
        lines = [*(o for o in outcomes if o.row.computed is None), *here]
        reference, full = reference_of(here[0], outcomes), full_forwards(outcomes)
        tables[count] = [cells(o, reference, full) for o in lines if o.samples]
        if full is not None:
            scene = "" if uncached_scene is None else f"{uncached_scene:.1%}"
            tables[count].insert(0, ["uncached", f"{full:.1f}", "1.00x", "reference", "", "", "", scene, "0", "0"])
    return tables


def reference_of(outcome: Outcome, outcomes: list[Outcome]) -> Outcome | None:
    """The reference at the budget of a row, if it was run."""
    same = (one for one in outcomes if one.row.label == REFERENCE and one.row.computed == outcome.row.computed)
    return next((one for one in same if one.samples), None)


def full_forwards(outcomes: list[Outcome]) -> float | None:
    """Forwards of a run without a cache."""
    return next((o.mean("forwards") for o in outcomes if o.row.label == NO_BUDGET), None)


def cells(outcome: Outcome, reference: Outcome | None, full: float | None) -> list[str]:
    """One line of a table. `full`: the forwards of a run without a cache."""
    samples = outcome.samples
    if outcome.reused_nothing(full):
        return [outcome.row.label, "did not reuse anything", *[""] * (len(COLUMNS) - 2)]
    against = ""
    if reference is not None and reference is not outcome:
        against = interval_text(outcome.gain("psnr_db", reference), "+.2f")
    psnr, speedup = mean_psnr([one["psnr_db"] for one in samples]), outcome.speedup
    lpips, scene = outcome.mean("lpips"), outcome.mean("scene")
    return [
        outcome.row.label if outcome.row.computed is not None else f"{outcome.row.label}: uncached again",
        f"{outcome.mean('forwards'):.1f}",
        f"{speedup:.2f}x" if speedup else "",
        "identical" if psnr is None else f"{psnr:.2f}",
        against,
        f"{outcome.mean('ssim'):.4f}",
        "" if lpips is None else f"{lpips:.4f}",
        "" if scene is None else f"{scene:.1%}",
        f"{max(one['cache_bytes'] for one in samples):,}",
        f"{outcome.calibration_s:.0f}",
    ]


def differences(outcomes: list[Outcome], count: int) -> list[list[str]]:
    """All paired differences to the reference at a budget, in the order of the table."""
    here = [o for o in in_order(outcomes, count) if o.samples]
    reference = reference_of(here[0], outcomes) if here else None
    if reference is None:
        return []
    others = [o for o in here if o is not reference and not o.reused_nothing(full_forwards(outcomes))]
    return [
        [o.row.label, *(interval_text(o.gain(key, reference), form) for key, form in COMPARED.items())] for o in others
    ]


def in_order(outcomes: list[Outcome], count: int) -> list[Outcome]:
    """The rows of a budget, best PSNR first."""
    here = [o for o in outcomes if o.row.computed == count]
    return sorted(here, key=lambda o: -(o.mean("psnr_db") or -1))


def not_run(outcomes: list[Outcome], count: int) -> list[list[str]]:
    """Lines of a table for what has no samples."""
    labels = [o.row.label for o in outcomes if o.reason and o.row.computed in (count, None)]
    return [[label, "not run", *[""] * (len(COLUMNS) - 2)] for label in labels]


def as_markdown(
    about: str, tables: dict[int, list[list[str]]], paired: dict[int, list[list[str]]], outcomes: list[Outcome]
) -> str:
    """All tables, each with its paired differences, and with what was not run and why."""
    run_by = environment()
    where = "; ".join(sorted({o.ran_on for o in outcomes if o.ran_on})) or run_by["device"]
    commits = ", ".join(sorted({o.commit for o in outcomes if o.commit}))
    text = [f"# {about}", f"`{run_by['command']}`; samples made at commit {commits or run_by['git_commit']}, {where}."]
    text.append(
        f"Best PSNR first. Forwards are counted, in equivalents of whole ones. Speed-ups are medians over pairs timed in "
        f"turns, one sample after the other. Differences are paired by prompt and noise, row minus {REFERENCE}, with their "
        "95 % intervals; that of the speed-up is the mean over the timed pairs."
    )
    for count, table in tables.items():
        text += [f"## {count} computed steps", markdown(list(COLUMNS), table).strip()]
        if paired[count]:
            text += [f"Against {REFERENCE}:", markdown(list(DIFFERENCES), paired[count]).strip()]
        reasons = [f"- {o.row.label}: {o.reason}" for o in outcomes if o.reason and o.row.computed in (count, None)]
        text += ["Not run:", "\n".join(reasons)] if reasons else []
    return "\n\n".join(text) + "\n"


def point(outcome: Outcome, reference: Outcome | None) -> dict[str, Any]:
    """A row as a point of the figures, and all its paired differences to the reference: [mean, low, high]."""
    means = {
        key: outcome.mean(key) for key in ("forwards", *(key for key in COMPARED if key != SPEEDUP), "cache_bytes")
    }
    gains = {key: outcome.gain(key, reference) for key in COMPARED} if reference is not None else {}
    return {
        "method": outcome.row.label,
        "computed": outcome.row.computed,
        **means,
        SPEEDUP: outcome.speedup,
        "calibration_s": outcome.calibration_s,
        f"against_{REFERENCE}": {key: [g.mean, g.low, g.high] for key, g in gains.items() if g is not None},
    }
