"""The typed configuration: Hydra checks every key and type against these classes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, AnyNode, BooleanNode, DictConfig, IntegerNode, OmegaConf

from erta.errors import BudgetError, ErtaError
from erta.options import PlanOptions
from experiments.bench.vbench import dimensions
from experiments.harness.checks import check_values
from experiments.harness.experiment_keys import OWN_KEYS
from experiments.harness.help import help_node

CONF = Path(__file__).resolve().parents[2] / "conf"
DEFAULT_SPEEDUP = 2.0
BUDGETS = ("threshold", "speedup", "steps")
ROOT_KEYS = ("seed", "resume", "wait")
TRUTHS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"})
MP4_BLOCK = 16  # pixels


@dataclass
class ModelConfig:
    name: str = MISSING
    pipeline: str = MISSING
    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None  # a commit or tag on the hub
    embedded: bool = False
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None  # of a pipeline's second transformer; null: as of the first
    true_cfg_scale: float | None = None  # beside an embedded guidance (FLUX), by a second forward; null: none
    flow_shift: float | None = None
    height: int = MISSING
    width: int = MISSING
    num_frames: int | None = None
    max_sequence_length: int | None = None  # of the text, in tokens; null: the pipeline's own
    fps: int = 8  # frames a second of the clips; VBench's dynamic degree depends on it
    dtype: str = "float32"
    offload: str = "none"  # on a GPU: model keeps one model there at a time, sequential one layer
    vae_tiling: bool = False
    compile: bool = False  # of the transformer's repeated blocks
    paper_threshold: float | None = None
    prompt_source: str = "scenes"
    world: str = "plain"  # of the scenes that prompts ask for and embedded models are trained on: plain or rich


@dataclass
class SamplerConfig:
    name: str = MISSING
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodFacts:
    """What a method says of itself: how it is shown, and what a comparison does with it."""

    title: str = MISSING  # in tables and figures
    group: str = MISSING  # one of checks.METHOD_GROUPS
    has_budget: bool = True  # it can be asked for a number of computed steps
    whole_steps: bool = False  # it chooses beforehand which steps are computed whole: its grid can be taken
    same_steps_as: str | None = None  # another method that chooses the same steps
    steps_of: str | None = None  # the option by which it is told whose steps it takes
    from_calibration: bool = False  # its plan needs a calibration at most, no runs of its own
    slow_search: bool = False  # it searches by hundreds of generations: not in a quick comparison
    # options without the first steps that it computes as published
    no_warmup: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodConfig:
    """Of threshold, speedup and steps at most one is given; see `budget`."""

    _target_: str = MISSING
    name: str = MISSING
    about: MethodFacts = field(default_factory=MethodFacts)
    threshold: float | None = None
    speedup: float | None = None
    steps: int | None = None
    site: str = "output"  # where the residual lives: output or blocks
    rectifier_fit: str = "open"  # along uncached trajectories; closed: along the plan's own
    options: dict[str, Any] = field(default_factory=dict)  # a method's own


_TYPES = get_type_hints(PlanOptions)
CacheConfig = make_dataclass(  # the method, and how a plan is made of a calibration
    "CacheConfig",
    [(option.name, _TYPES[option.name], field(default=option.default)) for option in fields(PlanOptions)],
    bases=(MethodConfig,),
)
CacheConfig.__module__ = __name__  # so that other processes can be sent a configuration


@dataclass
class BenchConfig:
    name: str = MISSING
    num_prompts: int | None = 16  # null only in VBench's standard suite: all that its dimensions need
    prompts: str | None = None
    frames_from: str = "decoded"  # what PSNR, SSIM, MS-SSIM and LPIPS compare; or mp4
    dimensions: Any = field(default_factory=list)  # of VBench: a list of names, one name, or all
    suite: str = "custom"  # or standard: VBench's own prompts
    videos_per_prompt: int = 5  # of the standard suite
    python: str | None = None  # interpreter of the VBench worker; null: this one
    image_scores: bool = False  # FID and CLIP score
    reference: str | None = None  # FID: a folder of images; null: on scenes, rendered ones
    num_reference: int = 1024  # FID: how many are rendered
    clip: str | None = None  # CLIP score: a folder or name on the hub; null: clip_tiny on scenes, else OpenAI's


@dataclass
class CalibrationConfig:
    num_prompts: int = 20
    knob_prompts: int = 3  # of them, for each value that is tried of a method's own parameter
    prompts: str | None = None
    window: int = 16
    path: str | None = None
    allow_interpolation: bool = False
    shard: str | None = None  # k/n: calibrate on the k-th of n parts of the prompts
    parts: list[str] = field(default_factory=list)


@dataclass
class WandbConfig:
    mode: str = "offline"
    project: str = "ertacache"


@dataclass
class SweepConfig:
    target_psnr_db: float | None = None  # what a sweeper that searches is to come near


@dataclass
class ExperimentConfig:
    """Which experiment it is, and what it reads: a setting that it does not read is refused."""

    _target_: str = MISSING
    name: str = MISSING
    folder: str = MISSING  # what the name of its run folder ends in
    reads: list[str] = field(default_factory=list)  # groups and keys
    benches: list[str] = field(default_factory=list)  # choices of `bench`; none: all that there are
    because: dict[str, str] = field(default_factory=dict)  # why a group or key is not read
    ranks: bool = False  # it shares its work over the processes of torchrun
    keeps_folder: bool = False  # its run folder has one name: given again, it goes on there, finished or not


SCHEMA: dict[str, Any] = {
    "model": ModelConfig,
    "sampler": SamplerConfig,
    "cache": CacheConfig,
    "bench": BenchConfig,
    "experiment": ExperimentConfig,
    "calibration": CalibrationConfig,
    "wandb": WandbConfig,
    "sweep": SweepConfig,
}


def register() -> None:
    """Make the schema, for the root, for every group and for the experiments' own keys, and the help known to Hydra."""
    store = ConfigStore.instance()
    store.store(
        name="config_schema",
        node={
            **SCHEMA,
            "seed": IntegerNode(0, is_optional=False),
            "resume": AnyNode(True),
            "wait": BooleanNode(False, is_optional=False),
        },
    )
    for name, keys in OWN_KEYS.items():
        store.store(group="keys", name=name, node=keys)
    store.store(group="hydra/help", name="erta", node=help_node(CONF))


def all_keys() -> list[str]:
    """Every group and key of the configuration, dotted; an experiment's own keys under its name."""

    def below(node: Any, prefix: str) -> list[str]:
        if not is_dataclass(node):
            return []
        return [
            key
            for item in fields(node)
            for key in (prefix + item.name, *below(item.default_factory, f"{prefix}{item.name}."))
        ]

    files = [path.read_text() for path in sorted((CONF / "experiment").glob("*.yaml"))]
    own = {found[1]: found[2] for text in files if (found := re.search(r"/keys@(\w+): (\w+)", text))}
    named = {**SCHEMA, **{name: OWN_KEYS[keys] for name, keys in own.items()}}
    return [*ROOT_KEYS, *named, *(key for name, node in named.items() for key in below(node, f"{name}."))]


def own_keys(cfg: DictConfig) -> DictConfig:
    """The own keys of the experiment that is run; empty where it has none."""
    return cfg.get(cfg.experiment.name, OmegaConf.create())


def model_is_asked() -> bool:
    """Whether the command line names a model, where an experiment has its own."""
    return any(override.startswith("model=") for override in HydraConfig.get().overrides.task)


def check_is_read(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise ErtaError for a setting on the command line that the experiment does not read."""
    for group in SCHEMA:
        if not OmegaConf.is_dict(cfg[group]):
            raise ErtaError(f"{group}={cfg[group]}: {group} is a group of keys; python run.py --cfg job shows them")
    experiment = cfg.experiment
    always = ("experiment", *ROOT_KEYS, "wandb", experiment.name)
    for override in overrides:
        key = override.split("=")[0].lstrip("~")
        if key.startswith("experiment.") or key.endswith("._target_") or override.startswith("~"):
            raise ErtaError(f"{override}: this is not set, but chosen with its group, as in experiment=… or cache=…")
        value = override.partition("=")[2].strip()
        if isinstance(OmegaConf.select(cfg, key), bool) and value.lower() not in TRUTHS:  # else any number is true
            raise ErtaError(f"{key} must be true or false, not {value or 'empty'}")
        if not any(_is_in(key, part) for part in (*always, *experiment.reads)):
            choices = [part for part in experiment.reads if _is_in(part, key)]  # a group of which some keys are read
            if not choices:
                why = next((text for part, text in experiment.because.items() if _is_in(key, part)), None)
                raise ErtaError(f"{override}: {why or f'experiment={experiment.name} does not read it'}; leave it out")
    if experiment.benches and cfg.bench.name not in experiment.benches:
        raise ErtaError(
            f"experiment={experiment.name} does not evaluate bench={cfg.bench.name}: it takes "
            f"bench={' or '.join(experiment.benches)}"
        )


def _is_in(key: str, part: str) -> bool:
    return key == part or key.startswith(f"{part}.")


def budget(cfg: DictConfig) -> dict[str, float | int]:
    """The one budget of a run, as the keyword argument of `Calibration.plan`.

    Without any, a model's published threshold is used, else a speed-up of 2. Raises BudgetError for two.
    """
    given = {key: cfg.cache[key] for key in BUDGETS if cfg.cache[key] is not None}
    if len(given) > 1:
        named = " and ".join(f"cache.{key}={value:g}" for key, value in given.items())
        raise BudgetError(f"two budgets at once: {named}. Give one of cache.threshold, cache.speedup, cache.steps.")
    if given:
        return given
    if cfg.model.paper_threshold is not None:
        return {"threshold": cfg.model.paper_threshold}
    return {"speedup": DEFAULT_SPEEDUP}


def shard_range(shard: str | None, count: int) -> range:
    """Which of `count` calibration prompts a run is about: all of them, or those of a shard k/n."""
    if shard is None:
        return range(count)
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, total = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= total <= count:
        raise ErtaError(f"calibration.shard must be k/n with 1 ≤ k ≤ n ≤ {count}, the number of prompts, not {shard!r}")
    return range((number - 1) * count // total, number * count // total)


def _check_shards(cfg: DictConfig) -> None:
    if cfg.calibration.shard and cfg.calibration.parts:
        raise ErtaError("calibration.shard and calibration.parts at once: calibrate the shards, then merge their files")
    shard_range(cfg.calibration.shard, cfg.calibration.num_prompts)


def _check_calibration_prompts(cfg: DictConfig) -> None:
    """A calibration that is named, or merged, brings its prompts; only the closed-loop fit would read others."""
    made = [key for key in ("path", "parts") if cfg.calibration[key]]
    if cfg.calibration.prompts is not None and made and cfg.cache.rectifier_fit != "closed":
        raise ErtaError(f"calibration.prompts would not be read: calibration.{made[0]} brings its own prompts")


def _check_mp4(cfg: DictConfig) -> None:
    """Only videos are saved as mp4, and export_to_video rescales frames whose sides are not multiples of 16."""
    if cfg.bench.frames_from != "mp4":
        return
    if cfg.model.num_frames is None:
        raise ErtaError("bench.frames_from=mp4 is for videos, and this model makes images: leave it at decoded")
    if cfg.model.height % MP4_BLOCK or cfg.model.width % MP4_BLOCK:
        size = f"model.height={cfg.model.height} model.width={cfg.model.width}"
        raise ErtaError(f"bench.frames_from=mp4 needs sides that are multiples of {MP4_BLOCK}, not {size}")


def validate(cfg: DictConfig) -> None:
    """Raise ErtaError for values that have the right type but no meaning (see `checks`), and for those that do not go together."""
    check_values(cfg)
    _check_budget(cfg)
    _check_shards(cfg)
    _check_calibration_prompts(cfg)
    dimensions.validate(cfg)
    if cfg.model.compile and cfg.model.offload == "sequential":
        raise ErtaError("model.compile=true and model.offload=sequential: layers that come and go cannot be compiled")
    _check_mp4(cfg)
    PlanOptions(**{option.name: cfg.cache[option.name] for option in fields(PlanOptions)})


def _check_budget(cfg: DictConfig) -> None:
    chosen, steps = budget(cfg), cfg.model.num_inference_steps
    if chosen.get("speedup", 1) > steps:
        raise BudgetError(
            f"cache.speedup={chosen['speedup']:g} cannot be reached with {steps} steps: one step is always computed, "
            f"so the largest is {steps}"
        )
    if not 1 <= chosen.get("steps", 1) <= steps:
        raise BudgetError(f"cache.steps={chosen['steps']} must lie between 1 and model.num_inference_steps={steps}")
