"""Prompt files: one prompt a line, JSON Lines with ids and seeds, or the captions of COCO. The suffix decides."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erta.errors import ErtaError

JSONL_KEYS = {"prompt", "id", "seed"}


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file, its id (without one, its place in the file: 000, 001, …), and its seed if it has one."""

    text: str
    id: str
    seed: int | None = None


def read_prompt_file(path: Path) -> list[FilePrompt]:
    """All prompts of a file, in its order, with unique ids.

    - `.jsonl`: an object a line with `prompt` and, if wanted, `id` (text or an integer) and `seed` (an integer ≥ 0);
    - `.json`: COCO's captions, {"annotations": [{"image_id", "caption", …}]}: the first caption of every image, its
      image_id as the id;
    - anything else: a prompt a line.

    Raises ErtaError, with the line, for a file that cannot be read, is not UTF-8, holds no prompts or breaks the format.
    """
    text = _read(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        prompts = _coco_captions(path, text)
    else:
        lines = text.removesuffix("\n").split("\n") if text else []
        prompts = [_prompt(path, index, line.strip(), suffix == ".jsonl") for index, line in enumerate(lines)]
    if not prompts:
        raise ErtaError(f"{path} holds no prompts")
    first: dict[str, int] = {}
    for number, prompt in enumerate(prompts, start=1):
        if prompt.id in first:
            raise ErtaError(f"{path}, line {number}: the id {prompt.id!r} is that of line {first[prompt.id]} already")
        first[prompt.id] = number
    return prompts


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ErtaError(
                f"{path}, line 1 cannot be read twice: it is a pipe or a device. Save the prompts as a file"
            )
        content = path.read_bytes()
    except OSError as error:
        raise ErtaError(f"cannot read the prompts from {path}: {(error.strerror or str(error)).lower()}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ErtaError(f"{path}, line {line} is not UTF-8 text: save the file as UTF-8") from error
    alone = re.search(r"\r(?!\n)", text)
    if alone:
        line = text[: alone.start()].count("\n") + 1
        raise ErtaError(f"{path}, line {line} ends in a carriage return alone: save the file with line ends \\n")
    return text


def _checked(where: str, text: str) -> str:
    """A prompt without characters that are none: halves of a surrogate pair, controls."""
    for character in text:
        if unicodedata.category(character) in ("Cs", "Cc"):
            raise ErtaError(f"{where} holds {character!r}, which is no character of a text: take it out")
    return text


def _parsed(where: str, text: str, column: bool = True) -> Any:
    """JSON. Raises ErtaError with what is wrong."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if column else f"{where}, line {error.lineno}"
        raise ErtaError(f"{place} is not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError as error:
        raise ErtaError(f"{where if column else f'{where}, line 1'} is nested too deeply to be prompts") from error
    except ValueError as error:  # a number of thousands of digits
        raise ErtaError(f"{where if column else f'{where}, line 1'} is not JSON: {error}") from error


def _prompt(path: Path, index: int, line: str, is_json: bool) -> FilePrompt:
    where, place = f"{path}, line {index + 1}", f"{index:03d}"
    if not line:
        raise ErtaError(f"{where} is empty: one prompt a line")
    if not is_json:
        return FilePrompt(_checked(where, line), place)
    entry = _parsed(where, line)
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ErtaError(f'{where} has no prompt: a line is {{"prompt": "…"}}, with "id" and "seed" if wanted')
    unknown = sorted(entry.keys() - JSONL_KEYS)
    if unknown:
        raise ErtaError(f"{where}: unknown key {unknown[0]!r}, a line has prompt, id and seed")
    text = _checked(where, entry["prompt"].strip())
    return FilePrompt(text, _id(where, entry.get("id", place)), _seed(where, entry.get("seed")))


def _id(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ErtaError(f"{where}: id must be text or an integer, not {json.dumps(value)}")
    return _checked(where, str(value))


def _seed(where: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ErtaError(f"{where}: seed must be an integer from 0 to 2^63 - 1, not {json.dumps(value)}")
    return value


def _coco_captions(path: Path, text: str) -> list[FilePrompt]:
    content = _parsed(str(path), text, column=False)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ErtaError(
            f'{path} has no "annotations": a .json prompt file holds COCO captions. Name it .jsonl for an object a line, '
            "or .txt for a prompt a line"
        )
    captions: dict[str, FilePrompt] = {}
    for number, entry in enumerate(annotations, start=1):
        where = f"{path}, annotation {number}"
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise ErtaError(f"{where} has no image_id")
        image = _id(where, entry["image_id"])
        if image in captions:
            continue
        caption = entry.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise ErtaError(f"{where} has no caption")
        captions[image] = FilePrompt(_checked(where, " ".join(caption.split())), image)
    return list(captions.values())
