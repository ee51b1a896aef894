"""What no page may hold: control characters, and folders of the machine it was written on."""

import re
from pathlib import Path
from typing import Any

from geolora.files.reading import read_json

NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
DEEPEST = 20
"""Levels of lists and objects."""
FOLDERS = re.compile(r"(?<![\w.~/:<\\-])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/]+[\\/])*(?=[^\s\\/])")
"""The folders of an absolute path; relative paths and addresses are left alone."""


def clean(text: str) -> str:
    """Text without the characters that no page may hold."""
    return NOT_IN_XML.sub("", text)


def read_clean(path: Path) -> Any:
    """The value in a JSON file, whose texts no figure and no page stumbles over.

    Raises:
        OSError, ValueError: as `read_json`, and where it is nested deeper than any file of ours.
    """
    return _cleaned(read_json(path), DEEPEST)


def _cleaned(value: Any, levels: int) -> Any:
    if levels < 0:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        return {clean(key): _cleaned(inner, levels - 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, levels - 1) for inner in value]
    return clean(value) if isinstance(value, str) else value


def without_folders(text: str) -> str:
    """Text in which absolute paths are names: pages are sent to others."""
    return FOLDERS.sub("", text)
