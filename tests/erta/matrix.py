"""Which pipelines: a tiny random instance of each pipeline class that is described here, and what the library does with it.

`python -m tests.erta.matrix` writes the page `erta/PIPELINES.md`; the slow test compares it with what it finds. A pipeline's
arguments are filled in by its signature, with embeddings in place of text; a row (`matrix_rows`) says what else it needs.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

import erta
from tests.erta.matrix_image_rows import IMAGE_ROWS
from tests.erta.matrix_rows import ROWS as FIRST_ROWS
from tests.erta.matrix_rows import STEPS, Row
from tests.erta.matrix_video_rows import VIDEO_ROWS

PAGE = Path(erta.__file__).with_name("PIPELINES.md")
BEFORE = Path(__file__).with_name("matrix_before.json")  # what an earlier state of the library did with the same rows
ROWS = (*FIRST_ROWS, *IMAGE_ROWS, *VIDEO_ROWS)
NO_ROW = {  # and why
    "ChromaInpaintPipeline": "does not run in this version of diffusers (asks its transformer for `guidance_embeds`)",
    "EasyAnimateControlPipeline": "does not run in this version of diffusers (an argument that its `encode_prompt` has not)",
    "DiTPipeline": "takes class labels, and a calibration wants prompts",
}
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
    return sorted(found - {row.pipeline for row in ROWS} - set(NO_ROW))


def page(found: dict[str, Verdict], before: dict[str, Any]) -> str:
    """The page, as it stands in the library's folder; `before` is the record of an earlier state."""
    rows = {row.pipeline: row for row in ROWS}
    lines = [
        "# Which pipelines",
        "",
        f'What `site="output"` does with tiny random instances of the pipeline classes of diffusers {diffusers.__version__}, and of',
        "this project's Open-Sora. Made by `python -m tests.erta.matrix`. A pipeline *works* if it calibrates, runs bit for bit as",
        "uncached where nothing is reused, makes the forwards that were planned, repeats itself, reuses velocities as an",
        "independent emulation does, and is as before afterwards. *Before* is what the library did until it told the guidance",
        f"branches of these pipelines apart ({before['library']}).",
        "",
        "`pytest -m slow tests/erta/test_matrix.py` checks every row against this page, in less than three minutes on two cores.",
        "",
        "| pipeline | transformer | before | now | guidance branches | why not |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items(), key=lambda item: item[0].lower()):
        earlier = before["verdicts"].get(name, "not tried")
        lines.append(f"| {name} | {rows[name].transformer} | {earlier} | {one.status} | {one.branches} | {one.why} |")
    lines += ["", "| | before | now |", "|---|---|---|"]
    for status in (WORKS, UNGUIDED, REFUSED, CRASHES):
        was = sum(before["verdicts"].get(name) == status for name in found)
        lines.append(f"| {status} | {was} | {sum(one.status == status for one in found.values())} |")
    others = untried()
    lines += ["", "Not tried here, though they have a transformer:", ""]
    lines += [f"- {name}: {why}" for name, why in sorted(NO_ROW.items())]
    lines += [f"- without a row yet, {len(others)}: {', '.join(others)}.", ""]
    return "\n".join(lines)


def record_of_before() -> dict[str, Any]:
    """See `BEFORE`."""
    return json.loads(BEFORE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(verdicts(), record_of_before()), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
