"""What no page may hold: control characters, and folders of the machine it was written on."""

import re

NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
FOLDERS = re.compile(r"(?<![\w.~/:<\\-])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/]+[\\/])*(?=[^\s\\/])")
"""The folders of an absolute path; relative paths and addresses are left alone."""


def clean(text: str) -> str:
    """Text without the characters that no page may hold."""
    return NOT_IN_XML.sub("", text)


def without_folders(text: str) -> str:
    """Text in which absolute paths are names: pages are sent to others."""
    return FOLDERS.sub("", text)
