"""The rows of a table as outcomes: their means, their paired differences, and what they say of a claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.intervals import Interval, paired_interval
from analysis.records import UNCACHED, Claim, FigureRecord, Row, Rows, RowScores, RowSetup, Sample
from analysis.verdicts import Result, results, verdict

WHOLE = 1e-3  # of a forward
IDENTICAL_DB = 100.0  # what identical samples count as where a number is needed
FLIPPED_DB = 30.0  # below it a sample is another outcome, not the same one a little off
FEWEST_TIMED = 2  # pairs of samples timed in turns
NO_PLACE = (None, None)  # of rows that stand beside all others
Metric = Callable[[Sample], float | None]
Place = tuple[str | None, int | None]  # see `records.Row.place`


def scene_all(sample: Sample) -> float | None:
    """1 if the sample shows all that was asked for."""
    return None if sample.scene is None else float(sample.scene["all"])


def speedup_of(sample: Sample) -> float | None:
    """Uncached over cached seconds of denoising; None where no pair was timed in turns."""
    return None if sample.uncached_s is None else sample.uncached_s / sample.denoise_s


METRICS: dict[str, Metric] = {
    "psnr_db": lambda sample: sample.psnr_db,
    "ssim": lambda sample: sample.ssim,
    "lpips": lambda sample: sample.lpips,
    "scene": scene_all,
    "speedup": speedup_of,
}


LOWER_IS_BETTER = ("lpips",)
FORMS = {  # metric: its heading and the form of its differences
    "psnr_db": ("PSNR dB", "+.2f"),
    "ssim": ("SSIM", "+.4f"),
    "lpips": ("LPIPS", "+.4f"),
    "scene": ("scene, all", "+.1%"),
    "speedup": ("speed-up", "+.2f"),
    "clip_score": ("CLIP score", "+.2f"),
}


@dataclass
class Outcome:
    """A row's samples in the order of the prompts, or why there are none."""

    row: Row
    noises: int = 1
    samples: list[Sample] = field(default_factory=list)
    setup: RowSetup | None = None
    reason: str | None = None
    scores: RowScores | None = None
    uncached_scene: list[dict[str, bool] | None] = field(default_factory=list)

    def by_prompt(self, metric: str) -> np.ndarray:
        """A metric by prompt, mean over its noises, (prompts,); NaN where one is not known.

        Of the noises that were timed in turns in the case of the speed-up.
        """
        values = np.array(self._values(metric), float).reshape(self.noises, -1)
        if metric != "speedup":
            return values.mean(0)
        timed = ~np.isnan(values)
        return np.where(timed, values, 0).sum(0) / np.where(timed.any(0), timed.sum(0), np.nan)

    def _values(self, metric: str) -> list[float | None]:
        """A metric of every sample, its own or a benchmark's; None where it is not known."""
        if metric in METRICS:
            return [METRICS[metric](sample) for sample in self.samples]
        scored = self.scores.by_sample.get(metric) if self.scores is not None else None
        return scored if scored is not None else [None] * len(self.samples)

    def known(self, metric: str) -> list[float]:
        """A metric of all samples that know it."""
        return [value for value in self._values(metric) if value is not None]

    def mean(self, metric: str) -> float | None:
        """Mean of what the samples know."""
        known = self.known(metric)
        return float(np.mean(known)) if known else None

    @property
    def psnr_median(self) -> float | None:
        """Median PSNR over samples, identical ones above all others; None if half of them are identical."""
        return _finite(np.median(self._psnr_or_inf()))

    @property
    def psnr_worst(self) -> float | None:
        """The lowest PSNR; None if all samples are identical."""
        return _finite(self._psnr_or_inf().min())

    @property
    def flips(self) -> float:
        """Share of samples that turned into another outcome: below 30 dB, or their scene is read otherwise than the uncached one's.

        A mean of decibels hides them: samples that stay (60 dB) and samples that flip (20 dB) are two populations.
        """
        scenes = self.uncached_scene or [None] * len(self.samples)
        flipped = [
            (sample.psnr_db is not None and sample.psnr_db < FLIPPED_DB)
            or (sample.scene is not None and scene is not None and sample.scene != scene)
            for sample, scene in zip(self.samples, scenes, strict=True)
        ]
        return float(np.mean(flipped))

    def _psnr_or_inf(self) -> np.ndarray:
        return np.array([np.inf if sample.psnr_db is None else sample.psnr_db for sample in self.samples])

    @property
    def forwards(self) -> float:
        """Mean over samples."""
        return float(np.mean([sample.forwards for sample in self.samples]))

    @property
    def speedup(self) -> float | None:
        """Median over the pairs that were timed in turns; None of a single one, which is no measurement."""
        known = self.known("speedup")
        return float(np.median(known)) if len(known) >= FEWEST_TIMED else None

    def interval(self, metric: str) -> Interval | None:
        """Mean over prompts with its 95 % interval; of PSNR over the prompts whose samples are not identical."""
        values = self.by_prompt(metric)
        values = values[~np.isnan(values)]
        return paired_interval(values) if len(values) else None

    def gain(self, metric: str, over: Outcome) -> Interval | None:
        """Paired difference to another row, 95 % over prompts; None where a sample does not know the metric.

        That of the speed-up is over the prompts on which both rows were timed, if these are two or more.
        """
        ours, theirs = self.by_prompt(metric), over.by_prompt(metric)
        if metric == "speedup":
            timed = ~np.isnan(ours) & ~np.isnan(theirs)
            if timed.sum() < FEWEST_TIMED:
                return None
            ours, theirs = ours[timed], theirs[timed]
        differences = ours - theirs
        return None if not len(differences) or np.isnan(differences).any() else paired_interval(differences)

    def reused_nothing(self, full: float | None) -> bool:
        """Whether as many forwards were made as without a cache, `full`."""
        if self.row.place == NO_PLACE or full is None or not self.samples:
            return False
        return min(sample.forwards for sample in self.samples) > full - WHOLE


class Comparison:
    """All outcomes of a table, in the order of its rows."""

    def __init__(self, rows: Rows) -> None:
        self.record = rows.record
        total = len(rows.record.prompts)
        found: dict[str, dict[int, Sample]] = {}
        for sample in rows.samples:
            found.setdefault(sample.row, {})[sample.index] = sample
        self.outcomes = []
        for row in rows.record.rows:
            mine = found.get(row.key, {})
            if len(mine) < total:
                why = rows.left_out.get(row.key, f"not finished: {len(mine)} of {total} samples")
                self.outcomes.append(Outcome(row, rows.record.noises, reason=why))
            else:
                samples = [mine[index] for index in range(total)]
                scores = rows.scores.get(row.key)
                scenes, setup = rows.record.uncached_scene, rows.setups.get(row.key)
                self.outcomes.append(
                    Outcome(row, rows.record.noises, samples, setup, scores=scores, uncached_scene=scenes)
                )
        self.uncached_scores = rows.scores.get(UNCACHED)

    @property
    def full_forwards(self) -> float | None:
        """Forwards of a run without a cache, as the row that stands beside all others made them."""
        return next((one.forwards for one in self.without_budget() if one.samples), None)

    @property
    def groups(self) -> list[Place]:
        """Places of the rows: blocks as they come, sites in their order, the largest budget first."""
        found = dict.fromkeys(one.row.place for one in self.outcomes if one.row.place != NO_PLACE)
        named = list(dict.fromkeys(name for name, _ in found))
        return sorted(found, key=lambda place: (named.index(place[0]), -(place[1] or 0)))

    def title(self, place: Place) -> str:
        """What a group of rows is called."""
        name, computed = place
        budget = [] if computed is None else [f"{computed} of {self.record.num_steps} steps"]
        return ", ".join([*([] if name is None else [name]), *budget])

    def without_budget(self) -> list[Outcome]:
        """Rows that stand in every group: the noise floor."""
        return [one for one in self.outcomes if one.row.place == NO_PLACE]

    def of(self, group: Place) -> list[Outcome]:
        """The rows of a group; best PSNR first if the table wants that."""
        here = [one for one in self.outcomes if one.row.place == group]
        if self.record.table.best_first:
            here.sort(key=lambda one: -(one.mean("psnr_db") or -1))
        return here

    def reference(self, group: Place) -> Outcome | None:
        """The row of a group that the others are compared with, if it was sampled."""
        label = self.record.table.reference
        return next((one for one in self.of(group) if one.row.label == label and one.samples), None)

    @property
    def reference_title(self) -> str:
        """What the reference is called."""
        label = self.record.table.reference
        return next((one.row.title for one in self.outcomes if one.row.label == label), label)

    def uncached_scene(self) -> float | None:
        """Share of the uncached samples that show what was asked for; None if it is not known of all."""
        known = [scene["all"] for scene in self.record.uncached_scene if scene]
        return float(np.mean(known)) if known and len(known) == len(self.record.prompts) else None

    def scene_change(self, outcome: Outcome) -> Interval | None:
        """Paired difference of the scene's agreement to the uncached samples, 95 % over prompts."""
        if self.uncached_scene() is None:
            return None
        uncached = np.array([scene["all"] for scene in self.record.uncached_scene if scene], float)
        differences = outcome.by_prompt("scene") - uncached.reshape(outcome.noises, -1).mean(0)
        return None if np.isnan(differences).any() else paired_interval(differences)

    def results(self) -> list[Result]:
        """What the rows say of the table's claims: one for each claim and each group in which both its rows stand."""
        made = []
        for claim in self.record.table.claims:
            for group in self.groups:
                rows = {one.row.label: one for one in self.of(group) if one.samples}
                if claim.better in rows and claim.worse in rows:
                    made.append(self._result(claim, group, rows[claim.better], rows[claim.worse]))
        return made

    def _result(self, claim: Claim, group: Place, better: Outcome, worse: Outcome) -> Result:
        name, form = FORMS[claim.metric]
        gain = better.gain(claim.metric, worse)
        if gain is not None and claim.metric in LOWER_IS_BETTER:
            gain = Interval(-gain.mean, -gain.high, -gain.low)
        values = [one.mean(claim.metric) for one in (better, worse)]
        return Result(
            claim=f"{claim.text} ({self.title(group)})" if len(self.groups) > 1 else claim.text,
            paper=claim.paper or printed(claim.metric, better.row, worse.row),
            ours=" against ".join("identical" if value is None else f"{value:{form[1:]}}" for value in values),
            delta=f"{name} {gain.mean:{form}} [{gain.low:{form}}, {gain.high:{form}}]" if gain is not None else "",
            verdict=verdict(gain, claim.margin),
            command=self.record.command,
        )


def results_of(made: Rows | FigureRecord) -> list[Result]:
    """What a table or a figure says of its claims."""
    return Comparison(made).results() if isinstance(made, Rows) else results(made)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def printed(metric: str, better: Row, worse: Row) -> str:
    """What is printed for two rows in one metric, and the difference; nothing if it is not."""
    if metric not in better.paper or metric not in worse.paper:
        return ""
    form, ours, theirs = FORMS[metric][1], better.paper[metric], worse.paper[metric]
    return f"{ours:{form[1:]}} against {theirs:{form[1:]}} ({ours - theirs:{form}})"


def as_point(outcome: Outcome, comparison: Comparison) -> dict[str, Any] | None:
    """What the figures show of a row, as arguments of `analysis.row_plots.Point`; None for what has no PSNR or no budget."""
    row, interval = outcome.row, outcome.interval("psnr_db") if outcome.samples else None
    if interval is None or row.place == NO_PLACE or outcome.reused_nothing(comparison.full_forwards):
        return None
    return {
        "title": row.title,
        "group": row.group,
        "budget": row.computed
        or round(comparison.record.num_steps * outcome.forwards / (comparison.full_forwards or 1)),
        "psnr_db": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "speedup": outcome.speedup,
        "is_reference": row.label == comparison.record.table.reference,
        "median": outcome.psnr_median,
        "worst": outcome.psnr_worst,
    }
