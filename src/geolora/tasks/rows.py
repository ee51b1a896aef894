"""Rows from files or the hub, and checks that say what is wrong with them in one line."""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geolora.errors import DataError, first_line, install, listed, nearest, shown
from geolora.files.reading import KeyTwice, is_file, is_folder, most_unpacked, parse_json
from geolora.tasks.csv_rows import ROW, TOO_LARGE, Row, demand_once, lines_of, read_csv

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))??(?::(\w+(?:\[[^\]]*\])?))?$")
"""owner/name, owner/name:split or owner/name:config:split."""
LARGEST = 1e16
"""Size of a number to learn: the loss squares it in float32, which ends at 3e38."""
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
WHOLE = re.compile(r"[-+]?\d{1,15}\.0*", re.ASCII)
SPLITS = {"--train": "train", "--eval": "validation"}


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
    if not is_file(path):
        if HUB.match(str(source)) and not is_folder(path.parent):
            return _read_hub(str(source), flag)
        folder = path.parent if is_folder(path.parent) else Path()
        hint = nearest(path.name, [entry.name for entry in folder.iterdir()])
        raise DataError(f"`{flag}` must be a file; {path} does not exist.{hint}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"`{flag}` must end in {', '.join(SUFFIXES)}; got {path.name}.")
    read = _reader_of(path, flag)
    try:
        rows = read(path)
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:
        raise DataError(f"`{flag}`: {path} cannot be read: {first_line(error)}.") from error
    if not rows:
        raise DataError(f"`{flag}` must have rows; {path} is empty.")
    return rows


def _reader_of(path: Path, flag: str) -> Callable[[Path], list[Row]]:
    if path.name.endswith(".csv"):
        return read_csv
    if path.name.endswith(".parquet"):
        _demand_datasets(flag)
        return _read_parquet
    return _read_jsonl


def _demand_datasets(flag: str) -> None:
    if find_spec("datasets") is None:
        raise DataError(
            f"`{flag}`: .parquet files and hub data sets need the package `datasets`. "
            f"Run: {install('data')}."
        )


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException, parquet

    most, rows, taken = most_unpacked(path), [], 0
    try:
        with parquet.ParquetFile(path) as file:
            demand_once(file.schema_arrow.names)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes = [max(1, group.total_byte_size) for group in groups]
            if sum(sizes) + ROW * file.metadata.num_rows > most:
                raise ValueError(f"{TOO_LARGE}. Write it again without compression")
            # a value is at most as large as its group, and any number of rows may share it
            for batch in file.iter_batches(max(1, min(1024, most // max([1, *sizes])))):
                # a column may be a dictionary still, which every row of ours has a copy out of
                whole = (getattr(c, "dictionary_decode", lambda c=c: c)() for c in batch.columns)
                taken += sum(column.nbytes for column in whole) + ROW * batch.num_rows
                if taken > most:
                    raise ValueError(f"{TOO_LARGE}. Write it again without compression")
                rows += batch.to_pylist()
    except (ArrowException, ArithmeticError) as error:
        raise ValueError(first_line(error)) from error
    return rows


def _read_hub(source: str, flag: str) -> list[Row]:
    """Rows of a data set on the hub; no code of the data set is run."""
    _demand_datasets(flag)
    import datasets

    match = HUB.match(source)
    assert match is not None  # noqa: S101 (read_rows)
    name, config, split = match.groups()
    try:
        with without_bars():
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


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the progress bars of `datasets`; at the end, also of a failure, they are as they were."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()


# ---- JSON ---------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    opened = gzip.open if path.name.endswith(".gz") else open
    most = most_unpacked(path) if path.name.endswith(".gz") else math.inf
    with opened(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(lines_of(file, most), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except KeyTwice as error:
                raise ValueError(f"line {number}: {error}. Remove one") from error
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({first_line(error)})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            if "\\ud" in line or "\\uD" in line:
                _demand_whole(row, number)
            rows.append(row)
    return rows


def _demand_whole(row: Row, number: int) -> None:
    """Raise ValueError for one half of a surrogate pair, which is no text and no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(
            f"line {number} has half of a character, {half}. Write the whole character"
        ) from error


# ---- columns ------------------------------------------------------------------------------------


def column(rows: Sequence[Row], name: str, flag: str, source: str) -> list[Any]:
    """One column of the rows; every row must have it.

    Raises:
        DataError: the column is missing, saying the nearest name, or empty in a row.
    """
    for number, row in enumerate(rows, 1):
        if name not in row:
            known = sorted(row)
            raise DataError(
                f"`{flag}`: {source} has no column `{name}` (row {number}); it has {listed(known)}."
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


def class_label(value: Any) -> str | None:
    """The name of a class, the same for 1, 1.0, "1" and "1.0"; None for what names none: lists, NaN, dates, nothing."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, str):
        return str(int(float(value))) if WHOLE.fullmatch(value) else value or None
    return str(value) if isinstance(value, int) and abs(value) < 10**100 else None


def classes(values: Sequence[Any], name: str, source: str) -> list[str]:
    """A column of classes, as their names.

    Raises:
        DataError: a value that is no name and no number: a list or a one-hot row, say.
    """
    result = []
    for number, value in enumerate(values, 1):
        label = class_label(value)
        if label is None:
            several = isinstance(value, Sequence | dict) and not isinstance(value, str | bytes)
            raise DataError(
                f"`--label`: column `{name}` must hold one name or number per row; row {number} of {source} "
                f"has {shown(value)}."
                + (" Of a one-hot row give the place of its 1." if several else "")
            )
        result.append(label)
    return result


def class_names(train: Sequence[Any], held_out: Sequence[Any], name: str) -> list[str]:
    """The sorted classes of the training labels; every held-out label must be one of them.

    Args:
        train: names, as `classes` gives them, and so is held_out.

    Raises:
        DataError: fewer than two classes, numbers that are not 0..K-1, or a class that was never
            trained; a label that names no class.
    """
    for label in (*train, *held_out):
        if class_label(label) is None:
            raise DataError(
                f"`--label`: column `{name}` must hold names or numbers; got {shown(label)}."
            )
    known = sorted({str(label) for label in train}, key=_natural)
    values = [_natural(label)[1] for label in known if _natural(label)[0] == 0]
    if values and (len(values) < len(known) or values != list(range(len(values)))):
        some = ", ".join(shown(label)[1:-1] for label in known[:4])
        raise DataError(
            f"`--label`: column `{name}` must hold names or 0..K-1 without gaps; got "
            f"{some}{', …' if len(known) > 4 else ''}. "
            "Renumber them, write names, or use --task text-regression."
        )
    if len(known) < 2:
        raise DataError(
            f"`--label`: column `{name}` must have two classes or more; got [{', '.join(map(shown, known))}]."
        )
    among = set(known)
    for label in held_out:
        if str(label) not in among:
            raise DataError(
                f"`--eval`: label `{shown(str(label))[1:-1]}` of column `{name}` does not occur in the "
                f"training data.{nearest(str(label), known)}"
            )
    return known


def numbers(values: Sequence[Any], name: str, source: str) -> list[float]:
    """A column of finite numbers.

    Raises:
        DataError: a value that is not a number, or one too large to be learnt.
    """
    result = []
    for number, value in enumerate(values, 1):
        try:
            parsed = float(value)
        except (TypeError, ValueError, OverflowError):
            parsed = math.nan
        if not math.isfinite(parsed):
            raise DataError(
                f"`--label`: column `{name}` must hold finite numbers; row {number} of {source} has "
                f"{shown(value)}. Use --task text-classification for classes."
            )
        if abs(parsed) > LARGEST:
            raise DataError(
                f"`--label`: column `{name}` must hold numbers up to {LARGEST:.0e}, whose squares float32 "
                f"holds; row {number} of {source} has {shown(value)}. Scale the column."
            )
        result.append(parsed)
    return result


def _natural(label: str) -> tuple[int, float, str]:
    return (0, float(label), label) if NUMBER.fullmatch(label) else (1, 0.0, label)
