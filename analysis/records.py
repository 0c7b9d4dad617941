"""What runs leave behind, typed: one dataclass a kind of record. Written by `experiments`, read here without guessing.

A run folder holds `record.json`; tables have a line a sample in `rows.jsonl`, a line a row in `setups.jsonl`, and the rows
that were not sampled in `left_out.json`. What lies in folders of earlier versions is brought to today's form when it is read
(`analysis.earlier`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

SCHEMA: Literal["erta.record/2"] = "erta.record/2"
RECORD, ROWS, SETUPS, LEFT_OUT, PER_PROMPT = (
    "record.json",
    "rows.jsonl",
    "setups.jsonl",
    "left_out.json",
    "per_prompt.jsonl",
)


class RecordError(ValueError):
    """A file that is no record, or not a whole one; the message names it."""


@dataclass(kw_only=True)
class _Made:
    """By which command, at which commit, with what, of which configuration."""

    schema: Literal["erta.record/2"] = SCHEMA
    command: str
    git_commit: str | None
    versions: dict[str, str | None]
    device: str
    config: dict[str, Any]
    config_hash: str


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
        overrides: what is typed after `python run.py` for it.
    """

    key: str
    label: str
    title: str
    method: str
    group: str
    computed: int | None
    site: str | None
    overrides: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Table:
    """How rows are shown.

    Attributes:
        reference: label of the row that the others of its group are compared with.
        columns: of `analysis.tables.COLUMNS`.
        best_first: rows are sorted by PSNR; else they keep their order.
        claims: [what is claimed, label of the better row, label of the worse], decided by paired intervals.
        paper: entry of `paper_tables.yaml` that is printed below.
        has_figures: whether the methods are compared in figures.
    """

    reference: str
    columns: list[str]
    best_first: bool = False
    claims: list[tuple[str, str, str]] = field(default_factory=list)
    paper: str | None = None
    has_figures: bool = False


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
    """`experiment=speed`: medians over pairs of generations with untrained weights, in seconds and bytes."""

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
    calibration_s: float
    calibration_generations: float
    cache_bytes: int
    cache_dtype: str
    peak_gpu_bytes: dict[str, int | None]


@dataclass(kw_only=True)
class ModelCardRecord(_Made):
    """`experiment=model_card`: counted without weights; by site where a number depends on it, None where not known."""

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


Record = MainRecord | RowsRecord | CalibrationRecord | SpeedRecord | ModelCardRecord | DecompositionRecord
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
_SAMPLE, _SETUP = TypeAdapter(Sample), TypeAdapter(RowSetup)


@dataclass(kw_only=True)
class Rows:
    """A table's record with all that was sampled for it."""

    record: RowsRecord
    samples: list[Sample]
    setups: dict[str, RowSetup]
    left_out: dict[str, str]


def parse(data: Any, where: Path) -> Record:
    """A record of any kind and version. Raises RecordError."""
    from analysis import earlier

    try:
        return _RECORD.validate_python(earlier.record(data, where))
    except (KeyError, TypeError, AttributeError) as error:  # of an earlier version, and not whole
        raise RecordError(f"{where} is not a whole record: it lacks {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecordError(f"{where} is not a whole record: {place or 'it'}: {first['msg'].lower()}") from error


def read(path: str | Path) -> Record:
    """The record of a run folder, or in a file. Raises RecordError if there is none, or it is damaged."""
    from analysis import earlier

    path = Path(path)
    if path.is_dir():
        path = next((file for name in (RECORD, *earlier.NAMES) if (file := path / name).is_file()), path / RECORD)
    return parse(_json(path), path)


def read_rows(path: str | Path) -> Rows:
    """A table with its samples: a run folder, finished or not, or a file of `analysis/data`. Raises RecordError."""
    from analysis import earlier

    path = Path(path)
    if path.is_dir():
        data = {
            "record": _json(path / RECORD),
            "samples": list(_lines(path / ROWS)),
            "setups": [*_lines(path / SETUPS), *_lines(path / earlier.SETUPS)],
            "left_out": _json(path / LEFT_OUT) if (path / LEFT_OUT).is_file() else {},
        }
    else:
        data = _json(path)
        if not isinstance(data, dict) or set(data) != {"record", "samples", "setups", "left_out"}:
            raise RecordError(f"{path} holds no rows: give the run folder, or a file of analysis/data")
    record = parse(data["record"], path)
    if not isinstance(record, RowsRecord):
        raise RecordError(f"{path} holds no rows: it is a record of the kind {record.kind!r}")
    try:
        lines = earlier.lines(data)
        samples = [_SAMPLE.validate_python(line) for line in lines["samples"]]
        setups = {(one := _SETUP.validate_python(line)).row: one for line in lines["setups"]}
        return Rows(record=record, samples=samples, setups=setups, left_out=data["left_out"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: a row is not whole: it lacks {error}") from error
    except ValidationError as error:
        raise RecordError(f"{path}: a row is not whole: {error.errors()[0]['msg'].lower()}") from error


def to_json(record: Any) -> dict[str, Any]:
    """A record, sample or setup as plain data."""
    return asdict(record)


def write_bundle(rows: Rows, path: Path) -> None:
    """A table with its samples as one gzipped JSON file, the same bytes for the same rows."""
    data = {
        "record": to_json(rows.record),
        "samples": [to_json(one) for one in rows.samples],
        "setups": [to_json(one) for one in rows.setups.values()],
        "left_out": rows.left_out,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _json(path: Path) -> Any:
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError as error:
        raise RecordError(f"{path.parent if path.name == RECORD else path} holds no record") from error
    except (OSError, ValueError, EOFError) as error:
        raise RecordError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _lines(path: Path) -> Iterator[Any]:
    """Whole lines; what a crash left of the last one is passed over. Raises RecordError for another that is none."""
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RecordError(f"{path}, line {number}, is damaged: delete it; the run makes it anew") from error
