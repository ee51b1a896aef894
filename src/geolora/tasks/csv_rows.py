"""Rows of a CSV file, read so that no row is lost in another, and lines that are not endless."""

import csv
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from geolora.errors import DataWarning, shown

LONGEST_LINE = 2**25
"""Characters of a line: a small .gz can hold one of any length."""
ROW = 64
"""Bytes that a row takes beside its texts, at least."""
TOO_LARGE = "it unpacks to more than a hundred times its size"
Row = dict[str, Any]


def lines_of(file: Any, most: float = math.inf) -> Iterator[str]:
    """The lines of an open text.

    Args:
        most: bytes they may take in memory, about.

    Raises:
        ValueError: one is longer than `LONGEST_LINE`, or all take more than `most`.
    """
    number = taken = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        taken += len(line) + ROW
        if taken > most:
            raise ValueError(f"{TOO_LARGE} (line {number:,}). Unpack it first")
        if len(line) > LONGEST_LINE:
            raise ValueError(f"line {number} has more than {LONGEST_LINE:,} characters")
        yield line


def demand_once(names: Sequence[str]) -> None:
    """Raise ValueError where two columns have one name: only one of them could be read."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two columns have the name {shown(name)}. Rename one")
        if name:
            seen.add(name)


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file.

    Raises:
        ValueError: two columns of one name, a row of more or fewer fields, the header among the rows, a quote that is
            not closed; with the row and the line.
    """
    usual = csv.field_size_limit(LONGEST_LINE)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _records(csv.reader(lines_of(file), strict=True), path.name)
    finally:
        csv.field_size_limit(usual)


def _records(reader: Any, name: str) -> list[Row]:
    """Rows of a CSV reader, each with the fields of the header; warns where one holds others."""
    records, rows, broken = _counted(reader), [], []
    _, header = next(records, (1, []))
    demand_once(header)
    for line, fields in records:
        if not fields:
            continue
        where = f"row {len(rows) + 1} (line {line})"
        if len(fields) != len(header):
            raise ValueError(
                f"{where} has {len(fields)} fields, the header {len(header)}. A text with a comma "
                "stands in quotes"
            )
        if len(header) > 1 and fields == header:
            raise ValueError(f"{where} is the header again. Take it out")
        if any("\n" in field or "\r" in field for field in fields):
            broken.append((where, fields))
        rows.append(dict(zip(header, fields, strict=True)))
    others = {name: {row[name] for row in rows} for name in header} if broken else {}
    for where, fields in broken:
        if _holds_rows(fields, list(others.values())):
            warnings.warn(
                f"{name}: {where} has a text of several lines that look like rows. If they are rows, a quote at the "
                "beginning of the text is not closed: write it twice, and one around the text.",
                DataWarning,
                stacklevel=2,
            )
            break
    return rows


def _counted(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(its first line, its fields) of every record."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if "end of data" in reason:
                reason = "the text that a quote begins has no end"
            elif "expected after" in reason:
                reason = (
                    f"a text in quotes goes on after its closing quote (line {reader.line_num}); a quote "
                    "inside of one is written twice"
                )
            raise ValueError(f"line {line} is not CSV: {reason}") from error
        yield line, fields


def _holds_rows(fields: list[str], others: list[set[str]]) -> bool:
    """Whether the lines of a field have as many fields as rows, with values of a column that other rows have too.

    Args:
        others: the values of every column.
    """
    width = len(others)
    for place, field in enumerate(fields):
        parts = [next(csv.reader([line]), []) for line in field.splitlines()]
        sizes = [width - place, *[width] * (len(parts) - 2), place + 1]
        if len(parts) < 2 or [len(part) for part in parts] != sizes:
            continue
        whole = [[""] * place + parts[0], *parts[1:-1], parts[-1] + [""] * (width - place)]
        for other, known in enumerate(others):
            inside = {part[other] for part in whole} - {""}
            if other != place and inside and inside <= known:
                return True
    return False
