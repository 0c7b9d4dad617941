"""Rows of a printed table, at the printed budgets: on the model that it was printed for, or scaled down on another."""

from __future__ import annotations

import itertools

from analysis.paper import Block, PrintedRow, PrintedTable
from analysis.records import Claim
from experiments.harness.rows import Row

NO_LESS_SPEEDUP = 0.9  # a closer row that is this much slower is no better


def rows_of(table: PrintedTable, model: str, num_steps: int) -> list[Row]:
    """The blocks printed for `model`; of a model that none is printed for, it stands in for all, at the same share of steps."""
    own = [block for block in table.blocks if block.model == model]
    return [_row(block, row, num_steps, bool(own)) for block in own or table.blocks for row in block.rows]


def claims_of(table: PrintedTable) -> list[Claim]:
    """Of every printed pair with ERTACache at one level: the closer one in PSNR is closer, at no less speed-up."""
    found: dict[tuple[str, str], Claim] = {}
    for block in table.blocks:
        for one, other in itertools.permutations([row for row in block.rows if row.method is not None], 2):
            if "ertacache" in (one.method, other.method) and one.level == other.level and _is_better(one, other):
                text = f"{one.title} is closer to the uncached samples than {other.title}"
                found[one.title, other.title] = Claim(text=text, better=one.title, worse=other.title)
    return list(found.values())


def _is_better(one: PrintedRow, other: PrintedRow) -> bool:
    closer = (one.psnr_db or 0.0) > (other.psnr_db or 0.0)
    return closer and one.speedup >= NO_LESS_SPEEDUP * other.speedup


def _row(block: Block, row: PrintedRow, num_steps: int, is_own: bool) -> Row:
    name, numbers = _name(block, row), _numbers(row)
    if row.method is None:
        return Row(row.title, "none", block=name, paper=numbers, why_not=row.why)
    needs = tuple(block.overrides.get(row.method, ())) if is_own else ()
    if is_own and row.threshold is not None:
        return Row(row.title, row.method, (*needs, f"cache.threshold={row.threshold:g}"), block=name, paper=numbers)
    if is_own and row.settings:
        return Row(row.title, row.method, (*needs, *row.settings), block=name, paper=numbers)
    return Row(row.title, row.method, needs, share_of(block, row, num_steps), block=name, paper=numbers)


def share_of(block: Block, row: PrintedRow, num_steps: int) -> int:
    """The number of computed steps of `num_steps` that is the printed row's share of its own."""
    share = row.computed_steps / block.steps if row.computed_steps is not None else 1 / row.speedup
    return min(max(round(share * num_steps), 1), num_steps)


def _name(block: Block, row: PrintedRow) -> str:
    return f"{block.title}, {row.level}"


def _numbers(row: PrintedRow) -> tuple[tuple[str, float], ...]:
    return tuple(row.numbers().items())
