"""Files that are written whole or not at all, also where the process is killed or the power goes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ends the name of what is not written to its end."""


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON so that a reader sees the whole file or none, also after a power cut."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with plain line ends, whole or not at all."""
    write_at_once(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def write_at_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, and put it in its place when it is on disk.

    Args:
        write: takes the name to write to. Where it fails, nothing is left of it, and `path` is as before.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        _bring_to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush(folder: Path) -> None:
    """Bring every file of a folder to disk."""
    for path in files_in(folder):
        _bring_to_disk(path)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _bring_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
