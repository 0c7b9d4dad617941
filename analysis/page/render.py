"""Templates to files: one environment for all pages, and writing that neither loses a page nor stops at odd text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis.records import utf8

TEMPLATES = Path(__file__).parent / "templates"


def write(template: str, path: Path, folder: Path = TEMPLATES, **shown: Any) -> None:
    """Fill `template`, which lies in `folder` or among the shared ones, and write it whole to `path`.

    All that is shown is escaped, whatever the template's name.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(utf8(environment.get_template(template).render(**shown)))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
