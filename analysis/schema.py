"""What runs leave behind, as types: one dataclass a kind of record (see `analysis.records`, which reads and writes them)."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

SCHEMA: Literal["erta.record/2"] = "erta.record/2"


@dataclass(kw_only=True)
class _Made:
    """By which command, at which commit, with what, on which day (UTC), of which configuration.

    `forced` names the inputs that changed while the run was continued all the same (`resume=force`).
    """

    schema: Literal["erta.record/2"] = SCHEMA
    command: str
    git_commit: str | None
    versions: dict[str, str | None]
    device: str
    date: str = ""
    config: dict[str, Any]
    config_hash: str
    forced: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _OfPrompts(_Made):
    """Sample k is of prompt k from the noise of seed k."""

    prompts: list[str]
    seeds: list[int]


@dataclass(kw_only=True)
class Steps:
    """`computed` is a fraction where a cache leaves parts of a forward out; `without_reuse` counts samples."""

    total: int
    computed: int | float
    mask: list[int]
    uncached: int
    without_reuse: int = 0


@dataclass(kw_only=True)
class Timing:
    """Medians over the pairs of samples, in seconds; `hook_overhead_of_forward` is a share."""

    denoise_s: float
    denoise_uncached_s: float
    pipeline_s: float
    pipeline_uncached_s: float
    forward_s: float
    solver_step_s: float
    calibration_s: float
    hook_overhead_per_step_s: float
    hook_overhead_of_forward: float
    forwards: int | float
    forwards_uncached: int | float
    repeats: int


@dataclass(kw_only=True)
class Memory:
    cache_bytes: int
    cache_dtype: str
    peak_bytes: int


@dataclass(kw_only=True)
class MainRecord(_OfPrompts):
    """`experiment=main`: metrics of the cached samples against the uncached ones.

    What was not evaluated is absent from `metrics` and stands in `missing` with the reason. Identical samples give
    `psnr_db: null` and `identical: true`.
    """

    kind: Literal["main"] = "main"
    steps: Steps
    sigmas: list[float]
    timing: Timing
    memory: Memory
    metrics: dict[str, Any]
    missing: dict[str, str | None]
    plan_report: dict[str, Any]


@dataclass(kw_only=True)
class Row:
    """A row of a table: a method at a budget.

    Attributes:
        key: names the row in its table, and its samples.
        label: the same in every group of rows; title: for people.
        method: of `conf/cache`; group: its kind, for colours.
        computed, site: rows with the same two are compared with each other; None: with all.
        block: a part of the table within which rows are compared, whatever their budgets.
        paper: the numbers that are printed for the row, by metric.
        overrides: what is typed after `python run.py` for it.
    """

    key: str
    label: str
    title: str
    method: str
    group: str
    computed: int | None
    site: str | None
    block: str | None = None
    paper: dict[str, float] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[str | None, int | None]:
        """Rows with the same place are compared with each other; those without any stand beside all."""
        return (self.block, None) if self.block is not None else (self.site, self.computed)


@dataclass(kw_only=True)
class Claim:
    """That one row is better than another, wherever both stand in one place; decided by paired intervals over prompts.

    Attributes:
        text: what is claimed.
        better, worse: labels of the rows.
        metric: of `analysis.comparison.METRICS`.
        margin: how much the better one may fall behind for the claim to hold: for "as good as".
        paper: what is printed about it; none: nothing is.
    """

    text: str
    better: str
    worse: str
    metric: str = "psnr_db"
    margin: float = 0.0
    paper: str = ""


@dataclass(kw_only=True)
class Table:
    """How rows are shown.

    Attributes:
        reference: label of the row that the others of its group are compared with.
        columns: of `analysis.tables.COLUMNS`.
        best_first: rows are sorted by PSNR; else they keep their order.
        claims: what the rows are to decide.
        figures: of `analysis.figures.OF_ROWS`.
        source: where the numbers of the rows' `paper` are printed.
    """

    reference: str
    columns: list[str]
    best_first: bool = False
    claims: list[Claim] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    source: str = ""


@dataclass(kw_only=True)
class RowsRecord(_OfPrompts):
    """A table: which rows there are, written when sampling begins. `prompts` holds every prompt once a noise.

    Attributes:
        noises: samples a prompt, each from a noise of its own; all prompts with the first noise come first.
        uncached_scene: what the uncached samples show, None where that cannot be checked, or is not known yet.
    """

    kind: Literal["rows"] = "rows"
    experiment: str
    num_steps: int
    noises: int
    rows: list[Row]
    table: Table
    uncached_scene: list[dict[str, bool] | None]


@dataclass(kw_only=True)
class Sample:
    """One sample of a row against its uncached twin.

    Attributes:
        forwards: of the transformer over all guidance branches, in equivalents of whole ones.
        uncached_s: denoising of an uncached run right before or after, None where none was timed.
        psnr_db: None if the samples are identical; lpips: None without its weights.
        scene: which attributes are as asked for, `all` among them; None for prompts that are not of the scene world.
    """

    row: str
    index: int
    forwards: float
    denoise_s: float
    uncached_s: float | None
    psnr_db: float | None
    ssim: float
    lpips: float | None
    scene: dict[str, bool] | None
    cache_bytes: int


@dataclass(kw_only=True)
class RowSetup:
    """How a row was set up: what its search and calibration took, the grid's last sigma, where and at which commit."""

    row: str
    calibration_s: float
    last_sigma: float | None
    ran_on: str
    commit: str | None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RowScores:
    """What a benchmark says of a row's samples together, and of each of them.

    Attributes:
        row: its key; `UNCACHED` for the uncached samples.
        whole: metric → value of all samples (FID, VBench's total).
        by_sample: metric → value of each sample, None where it has none.
        networks: metric → what computed it, where there is a choice.
        missing: metric → why it was not evaluated.
    """

    row: str
    whole: dict[str, float] = field(default_factory=dict)
    by_sample: dict[str, list[float | None]] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Planned:
    """What a number of computed steps would give; `missing` says why it cannot be had."""

    computed: int
    speedup: float
    missing: str | None = None
    reuse_error: float | None = None
    reuse_error_std: float | None = None
    rectifier_r2: float | None = None
    rectifier_r2_by_step: list[float | None] | None = None
    break_even_generations: float | None = None


@dataclass(kw_only=True)
class CalibrationRecord(_Made):
    """`experiment=calibrate`: the record of the artifact (prompts, seconds, …) and what can be planned from it."""

    kind: Literal["calibration"] = "calibration"
    calibration: dict[str, Any]
    planned: list[Planned]


@dataclass(kw_only=True)
class SpeedRecord(_Made):
    """`experiment=speed`: medians over pairs of generations with untrained weights, in seconds and bytes.

    Attributes:
        scheduler_s: of the plan as a solver in the scheduler's place; None: it is none.
        fitted_s: of a fitted solver with as many steps; fitted_speedup: uncached over it in each pair, the median.
    """

    kind: Literal["speed"] = "speed"
    pairs: int
    computed: int
    uncached_s: float
    cached_s: float
    speedup: float
    possible_speedup: float
    forwards_uncached: float
    forwards: float
    forward_s: float
    hook_share: float
    scheduler_s: float | None = None
    fitted_s: float | None = None
    fitted_speedup: float | None = None
    calibration_s: float
    calibration_generations: float
    cache_bytes: int
    cache_dtype: str
    peak_gpu_bytes: dict[str, int | None]


@dataclass(kw_only=True)
class ModelCardRecord(_Made):
    """`experiment=model_card`: counted without weights; by site where a number depends on it, None where not known.

    Attributes:
        velocity_dtype: of what is kept at `output`, where that is not `cache_dtype`.
    """

    kind: Literal["model_card"] = "model_card"
    transformer: str
    transformers: int
    parameters: int
    latent_shape: list[int]
    forwards_per_step: int
    flops_per_forward: int
    flops_per_step: int
    flops_per_sample: int
    cache_dtype: str
    velocity_dtype: str | None = None
    cache_bytes: dict[str, int | None]
    reused_step_share: dict[str, float | None]
    calibration_generations: dict[str, float | None]


@dataclass(kw_only=True)
class DecompositionRecord(_OfPrompts):
    """`experiment=decomposition`: shares of the final error by part, means over prompts.

    Attributes:
        by_step: each step's share by part.
        growth: by step, how much a small random error put in after it has grown at the end: a value a prompt and direction.
        mask, total_norm: of the plan, and of the error's L2 norm, mean over prompts; None in records of before.
    """

    kind: Literal["decomposition"] = "decomposition"
    shares: dict[str, float]
    by_step: dict[str, list[float]]
    open_loop_over_total: float
    growth: dict[int, list[float]]
    mask: list[int] | None = None
    total_norm: float | None = None


@dataclass(kw_only=True)
class Measured:
    """A claim and what was measured about it.

    Attributes:
        paper: what the paper says or shows; ours: what was measured.
        values: by prompt, in `unit`; positive is as claimed. Their interval decides.
    """

    text: str
    paper: str
    ours: str
    values: list[float]
    unit: str


@dataclass(kw_only=True)
class FigureRecord(_OfPrompts):
    """A figure of the paper: the curves that it draws, and what they say of its claims.

    Attributes:
        experiment: names the figure, and the function of `analysis.figures.OF_FIGURES` that draws it.
        series: what is drawn; the experiment's docstring gives the shapes.
    """

    kind: Literal["figure"] = "figure"
    experiment: str
    series: dict[str, Any]
    claims: list[Measured]


Record = (
    MainRecord | RowsRecord | CalibrationRecord | SpeedRecord | ModelCardRecord | DecompositionRecord | FigureRecord
)


@dataclass(kw_only=True)
class Rows:
    """A table's record with all that was sampled for it."""

    record: RowsRecord
    samples: list[Sample]
    setups: dict[str, RowSetup]
    left_out: dict[str, str]
    scores: dict[str, RowScores] = field(default_factory=dict)
