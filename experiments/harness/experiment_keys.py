"""The keys that an experiment has of its own: `experiment=X` reads `X.key`, and conf/experiment/X.yaml says from which class."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Table:
    """Of every experiment whose rows are sampled by `harness.row_sampling`."""

    workers: int | None = None  # processes that share the rows; null: one a CPU thread for embedded models, else one
    seeds: int = 1  # noises a prompt
    timed: int = 6  # samples of each row that are timed in turns with uncached ones; a speed-up takes two


@dataclass
class Compare(Table):
    quick: bool = False  # 8 prompts, 2x only, knobs found on one prompt, no slow searches
    methods: list[str] = field(default_factory=list)  # of conf/cache; none: all
    budgets: list[int] = field(default_factory=list)  # numbers of computed steps; none: N/2, N/3, N/4
    worst: int = 0  # samples of the reference that are kept and shown at each budget
    oracles: bool = False  # also what has seen the test samples
    reference: str = "ertacache"  # the method that the others are compared with


@dataclass
class CalibrationSize(Table):
    sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 20, 32, 64])  # numbers of calibration prompts


@dataclass
class ThresholdSensitivity(Table):
    thresholds: list[float] = field(default_factory=list)


@dataclass
class LongVideo:
    frames: list[int] = field(default_factory=lambda: [1, 2, 4])  # times the model's own, at its own size
    sides: list[float] = field(default_factory=lambda: [1.5, 2.0])  # times the model's own, with its own frames


@dataclass
class Members:
    only: list[str] = field(default_factory=list)  # of the list; none: all
    num_prompts: int | None = None  # of each command, in place of its own


@dataclass
class Decomposition:
    growth_prompts: int = 16  # on which the growth of a small error is measured
    growth_directions: int = 3  # random ones, for each of these prompts and steps


@dataclass
class Regimes:
    dial: str = "guidance_scale"  # or true_cfg_scale, with guidance_scale=1, for models with an embedded guidance
    guidances: list[float] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)  # of conf/cache


@dataclass
class SolverTables:
    methods: list[str] = field(default_factory=list)  # of conf/cache, each a linear solver


@dataclass
class SolverLimits:
    guidances: list[float] = field(default_factory=list)  # at which it is fitted, to be run at the model's own
    weights: float = 0.05  # the random change of each layer, relative to its size
    prompts: list[int] = field(default_factory=list)  # numbers of calibration prompts
    positions: list[int] = field(default_factory=list)  # of the latents' entries that are kept
    refine: int = 12  # moves of a node that are tried where nodes are refined; 0: they are not
    worst: int = 4  # prompts whose samples are shown; 0: none


@dataclass
class Speed:
    pairs: int = 3  # of generations, uncached and in each other way


@dataclass
class TrainTiny:
    until: str | None = None  # stop after this part: autoencoder, decoder or clip, text, transformer
    work_dir: str | None = None  # where checkpoints are kept
    install: bool = True  # put the finished weights into erta/assets
    device: str | None = None  # null: cuda if there is one, else cpu
    steps: int | None = None  # of the transformer; null: what was found enough on two cores
    minutes: float | None = None  # of the transformer, restarts included: its end, however many steps that is
    batch_size: int | None = None  # of the transformer; null: what is fast on two cores


OWN_KEYS = {
    "table": Table,
    "compare": Compare,
    "calibration_size": CalibrationSize,
    "threshold_sensitivity": ThresholdSensitivity,
    "long_video": LongVideo,
    "members": Members,
    "decomposition": Decomposition,
    "regimes": Regimes,
    "solver_limits": SolverLimits,
    "solver_tables": SolverTables,
    "speed": Speed,
    "train_tiny": TrainTiny,
}
