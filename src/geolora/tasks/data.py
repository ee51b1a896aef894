"""Rows from local files, and checks that say what is wrong with them in one line."""

import csv
import difflib
import gzip
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from geolora.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv")
Row = dict[str, Any]


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean `x`?" for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


def read_rows(path: str | Path, flag: str) -> list[Row]:
    """Rows of a .jsonl, .jsonl.gz or .csv file.

    Args:
        path: the file. flag: what the user called it ("--train"), for messages.

    Raises:
        DataError: the file is missing, of another kind, empty or not readable.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, [entry.name for entry in folder.iterdir()])
        raise DataError(f"`{flag}` must be a file; {path} does not exist.{hint}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"`{flag}` must end in {', '.join(SUFFIXES)}; got {path.name}.")
    try:
        rows = _read_csv(path) if path.name.endswith(".csv") else _read_jsonl(path)
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {error}.") from error
    if not rows:
        raise DataError(f"`{flag}` must have rows; {path} is empty.")
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            rows.append(row)
    return rows


def column(rows: Sequence[Row], name: str, flag: str, source: str) -> list[Any]:
    """One column of the rows; every row must have it.

    Raises:
        DataError: the column is missing, saying the nearest name, or empty in a row.
    """
    for number, row in enumerate(rows, 1):
        if name not in row:
            known = sorted(key for key in row if key is not None)
            raise DataError(
                f"`{flag}`: {source} has no column `{name}` (row {number}); it has {known}."
                f"{nearest(name, known)}"
            )
        if row[name] is None or row[name] == "":
            raise DataError(f"`{flag}`: column `{name}` is empty in row {number} of {source}.")
    return [row[name] for row in rows]


def texts(rows: Sequence[Row], name: str, flag: str, source: str) -> list[str]:
    """A column of strings."""
    values = column(rows, name, flag, source)
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise DataError(
                f"`{flag}`: column `{name}` must hold text; row {number} of {source} has "
                f"{type(value).__name__}."
            )
    return values


def class_names(train: Sequence[Any], held_out: Sequence[Any], name: str) -> list[str]:
    """The sorted classes of the training labels; every held-out label must be one of them.

    Raises:
        DataError: fewer than two classes, or a class that was never trained.
    """
    known = sorted({str(label) for label in train}, key=_natural)
    if len(known) < 2:
        raise DataError(f"`--label`: column `{name}` must have two classes or more; got {known}.")
    for label in held_out:
        if str(label) not in known:
            raise DataError(
                f"`--eval`: label `{label}` of column `{name}` does not occur in the training data."
                f"{nearest(str(label), known)}"
            )
    return known


def numbers(values: Sequence[Any], name: str, source: str) -> list[float]:
    """A column of finite numbers.

    Raises:
        DataError: a value that is not a number.
    """
    result = []
    for number, value in enumerate(values, 1):
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise DataError(
                f"`--label`: column `{name}` must hold finite numbers; row {number} of {source} has "
                f"{value!r}. Use --task text-classification for classes."
            )
        result.append(found)
    return result


def _natural(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
