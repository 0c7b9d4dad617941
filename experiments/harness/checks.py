"""What the values of the configuration may be: one table of checks, a line a key. `config.validate` goes through it.

Types are Hydra's business (`config.SCHEMA`); here is what a value of the right type must be to mean something.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from erta.errors import BudgetError, ErtaError
from erta.options import BRANCHES, LOOPS, OPTION_CHOICES, OVER_PROMPTS, PLACEMENTS, SITES

DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "sequential")
FRAMES_FROM = ("decoded", "mp4")
WANDB_MODES = ("offline", "online", "disabled")
PROMPT_SOURCES = ("scenes", "vbench")
DIALS = ("guidance_scale", "true_cfg_scale")
WORLDS = ("plain", "rich")  # as experiments.scenes has them, which takes half a second to load
RECTIFIER_FITS = ("open", "closed")
# steps planned before the run; decided while it runs; parts inside the model; no cache; what has seen the test samples
METHOD_GROUPS = ("planned", "online", "inside", "none", "oracle")
RESUMES = ("true", "false", "force")

MOST_STEPS = 1000  # every scheduler here has 1000 training timesteps
MOST_PROMPTS = 100_000  # SEED_STRIDE lies between the noises of one prompt
MOST_SEED = 2**62  # torch's generators end at 2^64, and a run counts on from its seed
MOST_SIDE, MOST_FRAMES = 16_384, 4_096
MOST = 1_000_000  # of any other count
NOT_IN_A_PROJECT = set("/\\#?%:")


@dataclass(frozen=True)
class Number:
    """A finite number of a range; None passes where the key has None for "not given"."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is too little
    error: type[ErtaError] = ErtaError

    def why_not(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return "a number"
        if not isinstance(value, int) and not math.isfinite(value):
            return f"a finite number{'' if self.least == -math.inf else f' {self._from()}'}"
        if value < self.least or (self.above and value == self.least):
            return self._from()
        return f"at most {self.most:,.10g}".replace(",", " ") if value > self.most else None

    def _from(self) -> str:
        return f"> {self.least:g}" if self.above else f"≥ {self.least:g}"


@dataclass(frozen=True)
class Count(Number):
    """A whole number, at least 1 unless said otherwise."""

    least: float = 1
    most: float = MOST

    def why_not(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return f"a whole number, at least {self.least:g}"
        return super().why_not(value)

    def _from(self) -> str:
        return f"at least {self.least:g}"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]
    error: type[ErtaError] = ErtaError

    def why_not(self, value: Any) -> str | None:
        return None if value in self.words else f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Text:
    """A name, a file or a folder: not empty, of characters that can be printed."""

    without: frozenset[str] = frozenset()
    error: type[ErtaError] = ErtaError

    def why_not(self, value: Any) -> str | None:
        if not isinstance(value, str) or not value.strip():
            return "a name that is not empty; null for none" if value == "" or not isinstance(value, str) else "a name"
        if not value.isprintable():
            return "a name of printable characters"
        found = sorted(self.without & set(value))
        return f"a name without {' '.join(found)}" if found else None


@dataclass(frozen=True)
class ListOf:
    """A list, of which each entry passes."""

    each: Number | Choice | Text
    error: type[ErtaError] = ErtaError

    def why_not(self, value: Any) -> str | None:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            return "a list, as in [a,b]"
        for one in value:
            if why := self.each.why_not(one):
                return f"a list of which each entry is {why}"
        return None


Check = Number | Choice | Text | ListOf
PATH = Text()
FINITE = Number(0, 1e6)
GUIDANCE = Number(0, 1000)
CHECKS: dict[str, Check] = {
    "seed": Count(0, MOST_SEED),
    "model.name": Text(frozenset("/\\")),
    "model.pipeline": PATH,
    "model.path": PATH,
    "model.hub_id": PATH,
    "model.revision": PATH,
    "model.num_inference_steps": Count(2, MOST_STEPS),
    "model.guidance_scale": GUIDANCE,
    "model.guidance_scale_2": GUIDANCE,
    "model.true_cfg_scale": Number(1, 1000),
    "regimes.dial": Choice(DIALS),
    "model.flow_shift": Number(0, 1000, above=True),
    "model.height": Count(8, MOST_SIDE),
    "model.width": Count(8, MOST_SIDE),
    "model.num_frames": Count(1, MOST_FRAMES),
    "model.max_sequence_length": Count(1, 4096),
    "model.fps": Count(1, 240),
    "model.dtype": Choice(DTYPES),
    "model.offload": Choice(OFFLOADS),
    "model.paper_threshold": FINITE,
    "model.prompt_source": Choice(PROMPT_SOURCES),
    "model.world": Choice(WORLDS),
    "sampler.name": PATH,
    "cache.name": PATH,
    "cache.threshold": Number(0, 1e6, error=BudgetError),
    "cache.speedup": Number(1, error=BudgetError),
    "cache.steps": Count(1, error=BudgetError),
    "cache.site": Choice(SITES),
    "cache.rectifier_fit": Choice(RECTIFIER_FITS),
    "cache.about.title": PATH,
    "cache.about.group": Choice(METHOD_GROUPS),
    "cache.about.same_steps_as": PATH,
    "cache.about.steps_of": PATH,
    **{f"cache.{name}": Choice(words) for name, words in OPTION_CHOICES.items()},
    "bench.name": PATH,
    "bench.num_prompts": Count(1, MOST_PROMPTS),
    "bench.prompts": PATH,
    "bench.frames_from": Choice(FRAMES_FROM),
    "bench.videos_per_prompt": Count(1, 1000),
    "bench.python": PATH,
    "bench.reference": PATH,
    "bench.num_reference": Count(),
    "bench.clip": PATH,
    "calibration.num_prompts": Count(1, MOST_PROMPTS),
    "calibration.knob_prompts": Count(1, MOST_PROMPTS),
    "calibration.prompts": PATH,
    "calibration.window": Count(1, MOST_STEPS),
    "calibration.path": PATH,
    "calibration.shard": PATH,
    "calibration.parts": ListOf(PATH),
    "wandb.mode": Choice(WANDB_MODES),
    "wandb.project": Text(frozenset(NOT_IN_A_PROJECT)),
    "sweep.target_psnr_db": Number(0, 1000, above=True),
    # experiments' own; any other of theirs is checked by its type (see `own_check`)
    "regimes.guidances": ListOf(GUIDANCE),
    "solver_limits.guidances": ListOf(GUIDANCE),
    "solver_limits.weights": Number(0, 1, above=True),
    "solver_limits.prompts": ListOf(Count(1, MOST_PROMPTS)),
    "solver_limits.positions": ListOf(Count()),
    "long_video.frames": ListOf(Count(1, 64)),
    "long_video.sides": ListOf(Number(1, 64)),
    "threshold_sensitivity.thresholds": ListOf(FINITE),
    "compare.worst": Count(0),
    "solver_limits.refine": Count(0),
    "solver_limits.worst": Count(0),
    "compare.budgets": ListOf(Count(1, MOST_STEPS, error=BudgetError)),
    "calibration_size.sizes": ListOf(Count(1, MOST_PROMPTS)),
}
REQUIRED = ("bench.num_prompts",)  # None has no meaning, but in VBench's standard suite
OPTION_WORDS = {  # of `cache.options`, whatever the method
    "constants": ("calibrated", "published"),
    "loop": LOOPS,
    "branches": BRANCHES,
    "over_prompts": OVER_PROMPTS,
    "placement": PLACEMENTS,
}
WHOLE_OPTIONS = frozenset(  # counts whose default is null: found for the budget
    {"interval", "spatial", "temporal", "cross", "after", "terms", "taylor"}
)


@dataclass(frozen=True)
class Shape:
    """What sizes a pipeline makes: sides are multiples of `side` pixels, frames `times` k + `rest`; `times` 0: pictures."""

    side: int
    times: int
    rest: int = 1


SHAPES = {  # pipelines that are not named here are asked when they run
    "WanPipeline": Shape(16, 4),
    "FluxPipeline": Shape(16, 0),
    "CogVideoXPipeline": Shape(16, 4),
    "HunyuanVideoPipeline": Shape(16, 4),
    "OpenSoraPipeline": Shape(1, 17, 0),
}


def check_values(cfg: DictConfig) -> None:
    """Raise ErtaError, with the key, for a value that has the right type and no meaning."""
    for key, check in CHECKS.items():
        if (value := OmegaConf.select(cfg, key)) is not None:
            _raise(key, check, value)
    for key in REQUIRED:
        if OmegaConf.select(cfg, key) is None and cfg.bench.suite != "standard":
            raise ErtaError(f"{key} must be a number, at least 1, not null")
    _raise("resume", Choice(RESUMES), str(cfg.resume).lower())
    _check_options(cfg.cache.name, cfg.cache.options, cfg.model.num_inference_steps)
    _check_own(cfg)
    _check_sampler(cfg.sampler)
    check_shape(cfg.model)


def _raise(key: str, check: Check, value: Any) -> None:
    if why := check.why_not(value):
        shown = repr(value) if isinstance(value, str) else str(value)
        raise check.error(f"{key} must be {why}, not {shown if len(shown) < 80 else shown[:77] + '…'}")


def _check_options(method: str, options: Mapping[str, Any], steps: int) -> None:
    """A method's own options are of the kind that its file in conf/cache gives them, counts, shares and thresholds ≥ 0."""
    from experiments.harness import catalogue

    known = catalogue.configuration(method).options if method in catalogue.names() else {}
    for key, value in options.items():
        where, usual = f"cache.options.{key}", known.get(key)
        if known and key not in known:
            raise ErtaError(f"{where}: cache={method} has no such option, but {', '.join(known) or 'none at all'}")
        if value is not None or usual is not None:
            _raise(where, _option_check(str(key), usual), value)
        if key == "step_weights" and value is not None and len(value) != steps:
            raise ErtaError(
                f"{where} must be {steps} numbers, one for each of model.num_inference_steps, not {len(value)}"
            )


def _option_check(key: str, usual: Any) -> Check:
    if key in OPTION_WORDS:
        return Choice(OPTION_WORDS[key])
    if isinstance(usual, bool):
        return _Bool()
    if isinstance(usual, str) or key == "sampler":
        return PATH
    if key == "step_weights":
        return ListOf(Number(0, above=True))
    if OmegaConf.is_list(usual):
        return ListOf(Number(0, 1))
    if isinstance(usual, int) or key in WHOLE_OPTIONS:
        return Count(0)
    return FINITE


class _Bool(Choice):
    """A truth value, of a key whose type is not known to Hydra."""

    def __init__(self) -> None:
        super().__init__(("true", "false"))

    def why_not(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "true or false"


def _check_own(cfg: DictConfig) -> None:
    """The own keys of an experiment: counts ≥ 1, other numbers finite and > 0, texts not empty, methods that exist."""
    name = cfg.experiment.name
    for key, value in cfg.get(name, OmegaConf.create()).items():
        where = f"{name}.{key}"
        if where not in CHECKS and value is not None:
            _raise(where, own_check(str(key), value), value)


def own_check(key: str, value: Any) -> Check:
    """What an experiment's own key must be that has no line of its own among the checks."""
    from experiments.harness import catalogue

    if key in ("methods", "reference"):
        methods = Choice(tuple(catalogue.names()))
        return methods if key == "reference" else ListOf(methods)
    if isinstance(value, bool):
        return _Bool()
    if isinstance(value, int):
        return Count(0) if key == "timed" else Count()
    if isinstance(value, float):
        return Number(0, 1e6, above=True)
    return PATH if isinstance(value, str) else ListOf(PATH)


def _check_sampler(sampler: DictConfig) -> None:
    name = sampler.scheduler
    if name is None:
        return
    import diffusers  # it takes seconds, and most commands name no solver

    if not (name.isidentifier() and name.endswith("Scheduler") and hasattr(diffusers, name)):
        raise ErtaError(f"sampler.scheduler must be a scheduler of diffusers, not {name!r}; sampler=default has none")


def check_shape(model: DictConfig) -> None:
    """Raise ErtaError for a size or a number of frames that the pipeline would round, or cannot make."""
    shape = SHAPES.get(model.pipeline)
    if shape is None:
        return
    for side in ("height", "width"):
        if model[side] % shape.side:
            near = max(round(model[side] / shape.side), 1) * shape.side
            raise ErtaError(f"model.{side} must be a multiple of {shape.side}, not {model[side]}: {near} is near")
    frames = model.num_frames
    if shape.times == 0:
        if frames is not None:
            raise ErtaError(f"model.num_frames={frames}: {model.pipeline} makes pictures; leave it out (null)")
        return
    if frames is None:
        raise ErtaError(f"model.num_frames must be a number, not null: {model.pipeline} makes videos")
    if frames % shape.times != shape.rest % shape.times:
        near = max(round((frames - shape.rest) / shape.times), 1 - shape.rest) * shape.times + shape.rest
        form = f"{shape.times} k + {shape.rest}" if shape.rest else f"a multiple of {shape.times}"
        raise ErtaError(f"model.num_frames must be {form} for {model.pipeline}, not {frames}: {near} is near")
