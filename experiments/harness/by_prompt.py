"""What is measured prompt by prompt: with a bar, each prompt's line kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.output.console import progress_bar
from experiments.output.files import append_line, read_own_lines
from experiments.prompts.choose import Prompt


def by_prompt(
    title: str,
    prompts: list[Prompt],
    measure: Callable[[Prompt], dict[str, Any]],
    path: Path,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`measure` of every prompt as a line of JSON, with its index, the prompt and its seed; lines that `path` holds are not made
    again.

    `tell` is called with every line, also with those.
    """

    def index_of(line: dict[str, Any]) -> int | None:
        index = line.get("index")
        if not isinstance(index, int) or not 0 <= index < len(prompts):
            return None
        return index if [line.get("prompt"), line.get("seed")] == [prompts[index].text, prompts[index].seed] else None

    lines = {line["index"]: line for line in read_own_lines(path, index_of)}
    for index in sorted(lines):
        tell(lines[index])
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(prompts), completed=len(lines))
        for index, prompt in enumerate(prompts):
            if index in lines:
                continue
            lines[index] = {"index": index, "prompt": prompt.text, "seed": prompt.seed, **measure(prompt)}
            append_line(path, lines[index])
            tell(lines[index])
            bar.advance(task)
    return [lines[index] for index in range(len(prompts))]
