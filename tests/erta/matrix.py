"""Which pipelines: a tiny random instance of each pipeline class that is described here, and what the library does with it.

`python -m tests.erta.matrix` writes the page `erta/PIPELINES.md`; the slow test compares it with what it finds. A pipeline's
arguments are filled in by its signature, with embeddings in place of text; a row (`matrix_rows`) says what else it needs.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

import erta
from tests.erta.matrix_rows import ROWS, STEPS, Row

PAGE = Path(erta.__file__).with_name("PIPELINES.md")
COMPUTED = 3
WORKS, UNGUIDED, REFUSED, CRASHES = "works", "works with guidance off", "refused", "crashes"


@dataclass(frozen=True)
class Verdict:
    """What the library does with a pipeline class; `branches` as a calibration names them."""

    status: str
    branches: str = ""
    why: str = ""


def verdict_of(row: Row) -> Verdict:
    """Build the row's pipeline and try it, with guidance and, if that is refused, without.

    Raises what a pipeline raises without the library: then the row is wrong.
    """
    pipe, call = row.build()
    uncached(pipe, call)
    try:
        return Verdict(WORKS, ", ".join(attempt(pipe, call)))
    except Exception as error:
        refusal = Verdict(REFUSED if isinstance(error, erta.ErtaError) else CRASHES, why=one_line(error))
    pipe, call = row.build(guided=False)
    try:
        return Verdict(UNGUIDED, ", ".join(attempt(pipe, call)), refusal.why)
    except Exception:
        return refusal


def one_line(error: Exception) -> str:
    """An error's text for a table's cell."""
    text = " ".join(str(error).replace("|", "/").split())
    text = text[text.find("): ") + 3 :] if text.startswith("prompt 1 (") else text
    named = text if isinstance(error, erta.ErtaError) else f"{type(error).__name__}: {text}"
    return named if len(named) < 160 else f"{named[:159]}…"


def uncached(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """Final latents, under whatever is on the pipeline."""
    torch.manual_seed(3)  # some pipelines draw noise of their own
    with torch.no_grad():
        return pipe(generator=torch.Generator().manual_seed(3), output_type="latent", **call)[0]


def attempt(pipe: Any, call: dict[str, Any]) -> list[str]:
    """All checks of one pipeline; its branches. Raises what the library, or the pipeline, raises, AssertionError if wrong."""

    def latents() -> torch.Tensor:
        return uncached(pipe, call)

    plain, kind = latents(), type(pipe)
    assert torch.isfinite(plain).all() and torch.equal(latents(), plain), "the pipeline does not repeat itself"
    calibration = erta.calibrate(pipe, window=STEPS, **call)
    options = {"adjust_time": calibration.signature["grid"] == "sigmas"}
    with erta.cached(pipe, calibration.plan(steps=calibration.num_steps, **options)):
        assert torch.equal(latents(), plain), "nothing reused is not the uncached run"
    with erta.cached(pipe, calibration.plan(steps=COMPUTED, **options)) as trace:
        cached = latents()
        assert set(trace.forwards.values()) == {COMPUTED}, "other forwards than planned"
        assert torch.equal(latents(), cached), "the second call is another"
    assert not torch.equal(cached, plain), "nothing was reused"
    plan = calibration.plan(steps=COMPUTED, reuse="velocity", adjust_time=False, rectify=False)
    with erta.cached(pipe, plan) as trace:
        found = latents()
    wanted = emulated(pipe, plan.mask, len(trace.executed), latents)
    assert torch.equal(found, wanted), "velocity reuse is not what an emulation gives"
    assert type(pipe) is kind and torch.equal(latents(), plain), "the pipeline is not as before"
    return calibration.signature["branches"]


def emulated(pipe: Any, mask: tuple[bool, ...], forwards: int, latents: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The run with each forward's last computed output in its place, by a wrapper that knows nothing of the library."""
    own, count = pipe.transformer.forward, 0
    kept: dict[int, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        step, place = divmod(count, forwards)
        count += 1
        if mask[step]:
            kept[place] = own(*args, **kwargs)
        return kept[place]

    pipe.transformer.forward = forward
    try:
        return latents()
    finally:
        del pipe.transformer.forward


def verdicts(rows: tuple[Row, ...] = ROWS) -> dict[str, Verdict]:
    """By pipeline class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {row.pipeline: verdict_of(row) for row in rows}


def untried() -> list[str]:
    """Pipeline classes of the installed diffusers that have a transformer and no row here, by their source."""
    found = set()
    for path in Path(diffusers.__file__).parent.glob("pipelines/*/pipeline_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline"):
                made_with = [
                    argument.arg
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__"
                    for argument in method.args.args
                ]
                found |= {node.name} if "transformer" in made_with else set()
    return sorted(found - {row.pipeline for row in ROWS})


def page(found: dict[str, Verdict]) -> str:
    """The page, as it stands in the library's folder."""
    rows = {row.pipeline: row for row in ROWS}
    lines = [
        "# Which pipelines",
        "",
        f'What `site="output"` does with tiny random instances of the pipeline classes of diffusers {diffusers.__version__}. Made by',
        "`python -m tests.erta.matrix`, and checked by a slow test: a pipeline *works* if it calibrates, runs bit for bit as",
        "uncached where nothing is reused, makes the forwards that were planned, repeats itself, reuses velocities as an",
        "independent emulation does, and is as before afterwards.",
        "",
        "| pipeline | transformer | | guidance branches | why not |",
        "|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items(), key=lambda item: item[0].lower()):
        lines.append(f"| {name} | {rows[name].transformer} | {one.status} | {one.branches} | {one.why} |")
    counts = [
        f"{sum(one.status == status for one in found.values())} {status}"
        for status in (WORKS, UNGUIDED, REFUSED, CRASHES)
    ]
    others = untried()
    lines += [
        "",
        f"Of {len(found)}: {', '.join(counts)}.",
        "",
        f"Not tried, {len(others)} more classes with a transformer:",
        "",
    ]
    return "\n".join([*lines, ", ".join(others) + "."]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(verdicts()), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
