"""Rows from files or the hub, and checks that say what is wrong with them in one line."""

import csv
import gzip
import math
import re
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geolora.errors import DataError, first_line, nearest
from geolora.files import parse_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))??(?::(\w+(?:\[[^\]]*\])?))?$")
"""owner/name, owner/name:split or owner/name:config:split."""
SPLITS = {"--train": "train", "--eval": "validation"}
Row = dict[str, Any]


def read_rows(source: str | Path, flag: str) -> list[Row]:
    """Rows of a .jsonl, .jsonl.gz, .csv or .parquet file, or of a data set on the hub.

    Args:
        source: the file, or "owner/name", "owner/name:split", "owner/name:config:split" where no
            such file exists; without a split the one SPLITS gives for the flag.
        flag: what the user called it ("--train"), for messages.

    Raises:
        DataError: the file is missing, of another kind, empty or not readable; the set cannot be
            loaded, or `datasets` is not installed.
    """
    path = Path(source)
    if not path.is_file():
        if HUB.match(str(source)) and not path.parent.is_dir():
            return _read_hub(str(source), flag)
        folder = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, [entry.name for entry in folder.iterdir()])
        raise DataError(f"`{flag}` must be a file; {path} does not exist.{hint}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"`{flag}` must end in {', '.join(SUFFIXES)}; got {path.name}.")
    try:
        rows = _reader_of(path, flag)(path)
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {first_line(error)}.") from error
    if not rows:
        raise DataError(f"`{flag}` must have rows; {path} is empty.")
    return rows


def _reader_of(path: Path, flag: str) -> Callable[[Path], list[Row]]:
    if path.name.endswith(".csv"):
        return _read_csv
    if path.name.endswith(".parquet"):
        _demand_datasets(flag)
        return _read_parquet
    return _read_jsonl


def _demand_datasets(flag: str) -> None:
    if find_spec("datasets") is None:
        raise DataError(
            f"`{flag}`: .parquet files and hub data sets need the package `datasets`. "
            "Install geolora[data]."
        )


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _read_hub(source: str, flag: str) -> list[Row]:
    """Rows of a data set on the hub; no code of the data set is run."""
    _demand_datasets(flag)
    import datasets

    match = HUB.match(source)
    assert match is not None  # noqa: S101 (read_rows)
    name, config, split = match.groups()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split or SPLITS[flag])
    # any of a dozen classes of three packages: the network, the name, the config, the split
    except Exception as error:
        raise DataError(
            f"`{flag}`: no file {source}, and as a data set of the hub it cannot be loaded: "
            f"{first_line(error)}."
        ) from error
    rows: list[Row] = list(loaded)  # pyright: ignore[reportAssignmentType]
    if not rows:
        raise DataError(f"`{flag}` must have rows; {source} is empty.")
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
                row = parse_json(line)
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
        DataError: fewer than two classes, numbers that are not 0..K-1, or a class that was never
            trained.
    """
    known = sorted({str(label) for label in train}, key=_natural)
    values = [_natural(label)[1] for label in known if _natural(label)[0] == 0]
    if values and (len(values) < len(known) or values != list(range(len(values)))):
        shown = ", ".join(known[:4]) + (", …" if len(known) > 4 else "")
        raise DataError(
            f"`--label`: column `{name}` must hold names or 0..K-1 without gaps; got {shown}. "
            "Renumber them, write names, or use --task text-regression."
        )
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
            parsed = float(value)
        except (TypeError, ValueError):
            parsed = math.nan
        if not math.isfinite(parsed):
            raise DataError(
                f"`--label`: column `{name}` must hold finite numbers; row {number} of {source} has "
                f"{value!r}. Use --task text-classification for classes."
            )
        result.append(parsed)
    return result


def _natural(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
