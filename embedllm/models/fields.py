"""Reading JSON files nobody vouches for.

Owns the checks between a model's JSON files and the rest: size, syntax, type and range of every value taken. Knows
no model. Invariant: what a reader returns is a finite, in-range value of the type asked for, or ModelFormatError named
the file and the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from embedllm.errors import ModelFormatError

MAX_JSON_BYTES = 64 * 2**20
_MISSING = object()


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file; ModelFormatError when it is too large, not JSON, or not an object."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ModelFormatError(f"{path}: {size:,} bytes is more than the {max_bytes:,} a JSON file here may have")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFormatError):
            raise
        raise ModelFormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


class Fields:
    """One JSON object with checked access. `where` is what messages call it, for example "config.json".

    Every reader takes a default for a field that is absent or null; without one, its absence is an error.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.where}: field {name!r} {problem}")

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.raw.get(name) is not None

    def _take(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            self.fail(name, "is missing")
        return default

    def integer(self, name: str, low: int, high: int, default: Any = _MISSING) -> Any:
        """An int in [low, high]; a default is returned unchecked, so None can be one."""
        value = self._take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(name, f"must be an integer, got {_shown(value)}")
        if not low <= value <= high:
            self.fail(name, f"is {_shown(value)}, outside {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = _MISSING, *, above: bool = False) -> Any:
        """A finite float in [low, high], or (low, high] with `above`."""
        value = self._take(name, default)
        return value if value is default else self._checked_number(name, value, low, high, above)

    def _checked_number(self, name: str, value: object, low: float, high: float, above: bool) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, f"must be a number, got {_shown(value)}")
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            self.fail(name, f"is {_shown(value)}, outside {'above ' if above else ''}{low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            self.fail(name, f"must be true or false, got {_shown(value)}")
        return value

    def text(self, name: str, default: Any = _MISSING) -> Any:
        value = self._take(name, default)
        if value is not default and not isinstance(value, str):
            self.fail(name, f"must be a string, got {_shown(value)}")
        return value

    def numbers(self, name: str, length: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `length` finite numbers above `low`, at most `high`."""
        return tuple(self._checked_number(name, value, low, high, True) for value in self.items(name, length))

    def items(self, name: str, length: int) -> list[Any]:
        """A list of exactly `length` entries."""
        value = self._take(name, _MISSING)
        if not isinstance(value, list):
            self.fail(name, f"must be a list, got {_shown(value)}")
        if len(value) != length:
            self.fail(name, f"has {len(value):,} entries, expected {length:,}")
        return value

    def ids(self, name: str, high: int, most: int = 4_096) -> tuple[int, ...]:
        """Token ids below `high`: one int, a list of them, or () when absent."""
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if len(values) > most:
            self.fail(name, f"has {len(values):,} entries, at most {most:,} are allowed")
        for token in values:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < high:
                self.fail(name, f"has {_shown(token)}, expected token ids from 0 to {high - 1:,}")
        return tuple(values)

    def child(self, name: str) -> Fields:
        """A nested object; empty when absent."""
        value = self._take(name, {})
        if not isinstance(value, dict):
            self.fail(name, f"must be an object, got {_shown(value)}")
        return Fields(value, f"{self.where}: {name}")


def _shown(value: object) -> str:
    """A short repr: a hostile value may be enormous."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an enormous integer"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
