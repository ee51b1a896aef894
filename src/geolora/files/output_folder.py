"""Output folders: refused where they exist, unless geolora wrote them; disk errors in one line."""

import errno
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from geolora.errors import OutputError, first_line, shown
from geolora.files.folders import restore
from geolora.files.ours import holds, is_empty
from geolora.files.reading import exists

LONGEST_NAME = 200
"""Bytes; file systems take 255, of which what is written beside a folder needs some."""
OS_ERROR = re.compile(r"(?:os error|Os \{ code:) (\d+)")
"""How safetensors names the system's error; before 0.6 as `Os { code: 28, … }`."""
TORCH_SAYS = ("inline_container", "iostream error")
"""All that torch.save says where it cannot write."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_output(
    output: str | Path, overwrite: bool, kind: str = "run", inputs: Iterable[str | Path] = ()
) -> None:
    """Refuse an output folder that cannot or must not be written; nothing is changed.

    Args:
        output: the folder. overwrite: whether an existing one may be replaced.
        kind: what will be in it, and so what it may hold now: "run", "demo", "adapter", "comparison".
        inputs: files and folders that are read, and so must not lie inside it.

    Raises:
        OutputError: it has no usable name, exists and may not be replaced, was not written by geolora,
            holds an input, or cannot be written.
    """
    check_name(str(output), "`--output`")
    output = Path(output)
    restore(output.absolute())
    there = output.exists() and not is_empty(output)
    if there and not overwrite:
        raise OutputError(
            f"`--output`: {output} exists. Choose another folder, or add --overwrite."
        )
    if there and not output.is_dir():
        raise OutputError(f"`--output`: {output} is a file. Choose a folder.")
    resolved = output.resolve()
    for path in map(str, inputs):
        if exists(path) and Path(path).resolve().is_relative_to(resolved):
            raise OutputError(f"`--output`: {output} holds {path}, which is read. Choose another.")
    if there and not holds(output, kind):
        raise OutputError(
            f"`--output`: {output} is no {kind} that was written by geolora, so it is left alone. "
            "Choose another folder."
        )
    demand_writable(output)


def demand_writable(output: Path, flag: str = "`--output`") -> None:
    """Raise `OutputError` where a folder has no usable name, or no file can be made in it: rights alone do not tell.

    Args:
        output: need not exist. flag: where the user said it.
    """
    check_name(str(output), flag)
    place = output.absolute()
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        what = "cannot be written" if parent == place else f"cannot be made in {parent}"
        reason = error.strerror or first_line(error)
        raise OutputError(f"{flag}: {output} {what}: {reason}. Choose another folder.") from error


def check_name(output: str, flag: str) -> None:
    """Refuse a name that no file system takes, or that cannot be written down in UTF-8."""
    parts = Path(output).parts
    short = can_be_written_down(output) and all(len(p.encode()) <= LONGEST_NAME for p in parts)
    if not short or not output.strip():
        raise OutputError(
            f"{flag}: must be a path in UTF-8 of names of at most {LONGEST_NAME} bytes; got "
            f"{shown(output)}. Choose another folder."
        )


def can_be_written_down(path: str) -> bool:
    """Whether a path is text in UTF-8, without a null byte."""
    try:
        return b"\0" not in path.encode()
    except UnicodeEncodeError:
        return False


@contextmanager
def naming_disk_errors(output: str | Path, flag: str = "`--output`") -> Iterator[None]:
    """Turn a full disk and missing rights, from whatever library writes, into `OutputError`.

    What was whole before stays: checkpoints that are sealed, files that are replaced at once.

    Args:
        flag: where the user said `output`.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # tokenizers raises no other class, and torch no OSError
        chain = [error, error.__cause__, error.__context__]
        codes = {e.errno for e in chain if isinstance(e, OSError)}
        codes |= {int(code) for e in chain for code in OS_ERROR.findall(str(e))}
        torch_failed = any(text in str(e) for e in chain for text in TORCH_SAYS)
        if codes & NO_ROOM or torch_failed:
            what, do = "there is no space left", "Free some, and start the same command again"
        elif codes & NO_RIGHT:
            what, do = "it may not be written", "Choose another folder"
        else:
            raise
        raise OutputError(f"{flag}: {output}: {what}. {do}.") from error
