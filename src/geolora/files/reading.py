"""What is there, and JSON files, with plain errors for all that can be wrong."""

import json
import math
import os
from pathlib import Path
from typing import Any

from geolora.errors import shown

ALWAYS_UNPACKED = 2**28
"""Bytes that any file may unpack to."""


def exists(path: str | Path) -> bool:
    """Whether something is there; False for a name that no system takes, of which `Path.exists` raises."""
    return os.path.exists(path)


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False for a name that no system takes."""
    return os.path.isdir(path)


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False for a name that no system takes."""
    return os.path.isfile(path)


def most_unpacked(path: Path) -> int:
    """Bytes that what is in a compressed file may take: a hundred times its own size, or `ALWAYS_UNPACKED`.

    Real rows and pictures shrink to a tenth at best; four megabytes of nothing but zeros are four gigabytes.
    """
    return max(ALWAYS_UNPACKED, 100 * path.stat().st_size)


class KeyTwice(ValueError):
    """A key that stands twice in an object, of which Python would take the second."""


def read_json(path: Path, finite: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        finite: refuse NaN and Infinity, which are not JSON, and numbers that would be infinite. Losses may be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or not JSON (as `parse_json`).
    """
    return parse_json(path.read_text(encoding="utf-8"), finite)


def parse_json(text: str, finite: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        finite: as in `read_json`.

    Raises:
        KeyTwice: an object has a key twice.
        ValueError: it is not JSON, or nested too deeply to be read (json raises RecursionError).
    """
    numbers: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_with_keys_once, **numbers)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise KeyTwice(f"the key {shown(key)} stands twice")
    return result
