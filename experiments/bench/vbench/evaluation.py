"""VBench in the main job: what can be evaluated, before anything is generated, and the scores of both arms after."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from analysis.records import RowScores
from erta.errors import ErtaError
from experiments.bench.vbench.dimensions import cache_dir, requested, why_not
from experiments.bench.vbench.runner import UnreadableVideoError, evaluate, failed_imports, find_info
from experiments.bench.vbench.scores import GROUPS, aggregate, paired_difference
from experiments.bench.vbench.suite import Suite, check_complete, load_suite
from experiments.output import console, ranks
from experiments.output.files import append_line, read_lines
from experiments.prompts.choose import Prompt

SCORES = "vbench.jsonl"
NO_PACKAGE = "the vbench package is not installed: `make setup` installs it, or set bench.python"


@dataclass
class Evaluation:
    """The VBench part of a run: its dimensions, those that cannot be evaluated with the reason, and the scores.

    Attributes:
        suite: VBench's own prompts, or None for clips of any prompt.
        scores: dimension → {arm: {"score", "per_video"}}, filled by `score`.
    """

    dimensions: list[str]
    python: str | None
    suite: Suite | None
    has_package: bool
    missing: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """Find out which dimensions cannot be evaluated here; with the standard suite, say so at once."""
        if not self.dimensions:
            return
        if self.has_package:
            kind = "custom" if self.suite is None else "standard"
            self.missing |= why_not(self.dimensions, kind, failed_imports(self.dimensions, self.python))
        else:
            self.missing |= dict.fromkeys(self.dimensions, NO_PACKAGE)
        if self.suite is not None:
            videos = len(self.suite.texts) * self.suite.videos_per_prompt
            console.note(
                f"VBench: {videos} videos an arm for {len(self.dimensions)} dimensions, "
                f"of which {len(self.dimensions) - len(self.missing)} can be evaluated here"
            )
            for name, reason in self.missing.items():
                console.note(f"will not be evaluated: {name} ({reason})")

    def score(self, samples: dict[str, Path], names: dict[str, str], folder: Path) -> None:
        """Score the clips of both arms, or of the rows of a table, dimension by dimension; finished ones are kept in `folder`/vbench.jsonl.

        Args:
            samples: arm → folder of its clips.
            names: file name of each clip → its prompt.

        Raises ErtaError for a missing or damaged clip; a dimension that fails otherwise is listed as missing.
        """
        ready = [name for name in self.dimensions if name not in self.missing]
        if not ready:
            return
        check_complete(list(samples.values()), list(names))
        path = folder / SCORES

        def held() -> dict[str, dict[str, Any]]:
            ranks.merge_lines(path)
            lines = ranks.same(lambda: [row for row in read_lines(path) if row.get("dimension") in ready])
            return {row["dimension"]: row for row in lines}

        done = held()
        todo = ranks.share([name for name in ready if not samples.keys() <= done.get(name, {}).keys()])
        with console.progress_bar() as bar:
            task = bar.add_task("VBench", total=len(todo), visible=bool(todo))
            for name in todo:
                bar.update(task, description=f"VBench: {name}")
                entries = None if self.suite is None else self.suite.manifest(name)
                try:
                    arms = evaluate(name, samples, names, self.python, entries)
                except UnreadableVideoError:
                    raise
                except ErtaError as error:  # the other dimensions are worth having
                    self.missing[name] = str(error)
                else:
                    append_line(ranks.own_file(path), {"dimension": name, **arms})
                bar.advance(task)
        done = held()
        for missing in ranks.gathered(self.missing):
            self.missing |= missing
        for name in (name for name in ready if name not in self.missing):
            self.scores[name] = {arm: done[name][arm] for arm in samples}

    def rows(self, names: list[str]) -> list[RowScores]:
        """What `score` found of the rows of a table: `vbench_total` of the whole suite, else the mean of what was evaluated.

        Args:
            names: file names of the clips, in the order of the samples.
        """
        made = []
        for key in {key: None for arms in self.scores.values() for key in arms}:
            raw = {name: arms[key]["score"] for name, arms in self.scores.items()}
            whole = {f"vbench.{name}": score for name, score in raw.items()} | {
                "vbench_mean": sum(raw.values()) / len(raw)
            }
            if self.suite is not None and self.suite.is_whole:
                whole |= aggregate(raw)[0]
            by_sample = {
                f"vbench.{name}": [arms[key]["per_video"].get(clip) for clip in names]
                for name, arms in self.scores.items()
            }
            missing = {f"vbench.{name}": reason for name, reason in self.missing.items()}
            made.append(RowScores(row=key, whole=whole, by_sample=by_sample, missing=missing))
        return made

    def summarise(self) -> tuple[dict[str, Any], dict[str, str]]:
        """For the record: metrics of both arms with their paired differences, and what is missing with the reason."""
        metrics: dict[str, Any] = {}
        missing = {f"vbench.{name}": reason for name, reason in self.missing.items()}
        for arm, ending in (("cached", ""), ("uncached", "_uncached")):
            raw = {name: arms[arm]["score"] for name, arms in self.scores.items()}
            if raw:
                metrics[f"vbench{ending}"] = raw
            groups, absent = aggregate(raw)
            if self.suite is None:
                groups, absent = {}, {"vbench_total": "needs VBench's own prompts: bench=vbench_standard"}
            elif not self.suite.is_whole:
                groups, absent = {}, dict.fromkeys(GROUPS, "bench.num_prompts leaves out a part of the suite")
            metrics |= {key + ending: value for key, value in groups.items()}
            missing |= absent
        differences = {
            name: paired_difference(arms["cached"]["per_video"], arms["uncached"]["per_video"])
            for name, arms in self.scores.items()
        }
        metrics |= {"vbench_difference": differences} if differences else {}
        metrics |= {"vbench_videos_per_prompt": self.suite.videos_per_prompt} if self.suite else {}
        return metrics, missing


def prepare(cfg: DictConfig) -> Evaluation:
    """The VBench part of a run, nothing of it started yet.

    Raises ErtaError for an interpreter or a weights folder that cannot be used.
    """
    dimensions, python = requested(cfg.bench.dimensions), cfg.bench.python
    if not dimensions:
        return Evaluation([], python, None, has_package=False)
    if cfg.model.num_frames is None:
        reason = "VBench reads videos; this model makes images"
        return Evaluation([], python, None, has_package=False, missing=dict.fromkeys(dimensions, reason))
    info = find_info(python)
    cache_dir()
    if cfg.bench.suite == "custom":
        return Evaluation(dimensions, python, None, has_package=info is not None)
    if info is None:
        raise ErtaError(f"VBench's prompts come with its package, and {NO_PACKAGE}")
    return Evaluation(dimensions, python, load_suite(cfg, info), has_package=True)


def clip_name(prompt: Prompt, index: int) -> str:
    """The file name of a clip: VBench's own in its standard suite, else a number."""
    return prompt.clip or f"{index:03d}.mp4"
