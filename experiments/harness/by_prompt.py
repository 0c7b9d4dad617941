"""What is measured prompt by prompt: with a bar, each prompt's line kept as soon as it is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.output.console import progress_bar
from experiments.output.run_folder import append_line, read_lines
from experiments.prompts.choose import Prompt


def by_prompt(
    title: str,
    prompts: list[Prompt],
    measure: Callable[[Prompt], dict[str, Any]],
    path: Path,
    tell: Callable[[dict[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`measure` of every prompt as a line of JSON, with the prompt and its seed; lines that `path` holds are not made again.

    `tell` is called with every line, also with those.
    """
    lines = read_lines(path)
    for line in lines:
        tell(line)
    with progress_bar() as bar:
        task = bar.add_task(title, total=len(prompts), completed=len(lines))
        for prompt in prompts[len(lines) :]:
            lines.append({"prompt": prompt.text, "seed": prompt.seed, **measure(prompt)})
            append_line(path, lines[-1])
            tell(lines[-1])
            bar.advance(task)
    return lines
