"""What is read from files is checked field by field, so that nothing is computed from numbers that mean nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from erta.errors import ErtaError


def check_readable(path: str | Path, what: str) -> None:
    """Raise ErtaError that says why a file cannot be read: libraries say "no such file" of a folder and of a loop of links too."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ErtaError(f"cannot read {what} from {path}: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def arrays_of(
    path: str | Path, what: str, schemas: tuple[str, ...], again: str
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """The arrays of a file that `erta.files.save_arrays` wrote, and its JSON metadata by name.

    Whatever goes wrong then or within the `with` becomes one ErtaError, which ends with what to do: `again`.
    """
    check_readable(path, what)
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            found = metadata.pop("schema", None)
            if found not in schemas:
                raise ErtaError(f"{path} is not {what} of this version ({found!r}, not {' or '.join(schemas)})")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        yield arrays, {name: json.loads(text) for name, text in metadata.items()}
    except ErtaError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ErtaError(f"cannot read {what} from {path}: {error}. {again}") from error


class Fields:
    """A JSON object of a file, whose fields are taken out one by one. Every method raises ErtaError with file and field."""

    def __init__(self, where: str | Path, data: Any, name: str = "") -> None:
        self._where, self._name = where, name
        if not isinstance(data, Mapping):
            raise ErtaError(f"{where}: {name or 'it'} must be an object of fields, not {_short(data)}")
        if not data:
            raise ErtaError(f"{where}: {name or 'it'} is empty")
        self._data = data

    def wrong(self, key: str, must: str, value: Any = ...) -> ErtaError:
        """The error for a field."""
        given = "" if value is ... else f", not {_short(value)}"
        return ErtaError(f"{self._where}: {self._name + '.' if self._name else ''}{key} must be {must}{given}")

    def take(self, key: str) -> Any:
        """Whatever the field holds; it must be there."""
        if key not in self._data:
            raise self.wrong(key, "there, and it is not")
        return self._data[key]

    def plain(self) -> dict[str, Any]:
        """All of it as it is."""
        return dict(self._data)

    def inside(self, key: str) -> Fields:
        """An object in a field."""
        return Fields(self._where, self.take(key), f"{self._name + '.' if self._name else ''}{key}")

    def text(self, key: str, choices: Iterable[str] = ()) -> str:
        value, choices = self.take(key), tuple(choices)
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise self.wrong(key, f"one of {', '.join(choices)}" if choices else "a text", value)
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def number(self, key: str, least: float = -math.inf, optional: bool = False) -> float | None:
        value: Any = self._data.get(key) if optional else self.take(key)
        if optional and value is None:
            return None
        if not _is_number(value) or not math.isfinite(value) or value < least:
            raise self.wrong(key, "a finite number" + ("" if least == -math.inf else f" ≥ {least:g}"), value)
        return value

    def whole(self, key: str, least: int, most: int | None = None, optional: bool = False) -> int | None:
        value: Any = self._data.get(key) if optional else self.take(key)
        if optional and value is None:
            return None
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or value < least
            or (most is not None and value > most)
        ):
            raise self.wrong(key, f"a whole number from {least}" + ("" if most is None else f" to {most}"), value)
        return value

    def texts(self, key: str, least: int = 0) -> list[str]:
        value = self.take(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(value) < least:
            raise self.wrong(key, f"a list of {'at least ' + str(least) + ' ' if least else ''}texts", value)
        return value

    def wholes(self, key: str, least: int = 1, optional: bool = False) -> list[int] | None:
        value: Any = self._data.get(key) if optional else self.take(key)
        if optional and value is None:
            return None
        ok = isinstance(value, list) and value
        if not ok or not all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in value):
            raise self.wrong(key, f"a list of whole numbers ≥ {least}", value)
        return value

    def zeros_and_ones(self, key: str) -> tuple[bool, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value or not all(type(one) is int and one in (0, 1) for one in value):
            raise self.wrong(key, "a list of 0 and 1, a number a step", value)
        return tuple(bool(one) for one in value)

    def array(self, key: str, shape: tuple[int | None, ...], dtype: Any = np.float64) -> np.ndarray:
        """Finite numbers of a shape; None in it: any length."""
        value = self.take(key)
        try:
            array = np.array(value)
        except ValueError:
            raise self.wrong(key, f"numbers of shape {_shape(shape)}", value) from None
        if array.dtype.kind not in "if":
            raise self.wrong(key, f"numbers of shape {_shape(shape)}", value)
        return check_array(self._where, f"{self._name + '.' if self._name else ''}{key}", array, shape).astype(dtype)

    def grid(self, key: str) -> np.ndarray:
        """Sigmas of a time grid: finite, decreasing, not negative; float32."""
        name = f"{self._name + '.' if self._name else ''}{key}"
        return check_sigmas(self._where, name, self.array(key, (None,), np.float32))


def check_array(
    where: str | Path, name: str, array: np.ndarray, shape: tuple[int | None, ...], least: float = -math.inf
) -> np.ndarray:
    """The array, if it has this shape (None: any length) and holds finite numbers, none below `least`. Raises ErtaError."""
    fits = array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
    if not fits or array.dtype.kind not in "if":
        raise ErtaError(f"{where}: {name} must be numbers of shape {_shape(shape)}, not {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ErtaError(f"{where}: {name} holds NaN or infinity")
    if array.size and array.min() < least:
        raise ErtaError(f"{where}: {name} must be ≥ {least:g}, and holds {array.min():g}")
    return array


def check_sigmas(where: str | Path, name: str, sigmas: np.ndarray) -> np.ndarray:
    """The array, if it is a time grid: strictly decreasing as float32, not negative. Raises ErtaError."""
    if len(sigmas) < 2 or not (np.diff(sigmas.astype(np.float32)) < 0).all() or sigmas[-1] < 0:
        raise ErtaError(f"{where}: {name} must be strictly decreasing noise levels ≥ 0, one a step and the end")
    return sigmas


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if one is None else str(one) for one in shape)})"


def _short(value: Any, limit: int = 60) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
