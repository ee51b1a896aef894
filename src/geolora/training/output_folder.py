"""Output folders: refused where they exist, replaced only where geolora wrote them."""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from geolora.errors import OutputError

LOCK = ".lock"
"""Held by the process that works in a folder."""
OURS = ("run.json", "demo.json", "adapter_config.json")
"""Files by which a folder is known as one that geolora wrote."""
OS_ERROR = re.compile(r"os error (\d+)")
"""How safetensors names the system's error."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_output(output: str | Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse an output folder that cannot or must not be written; nothing is changed.

    Args:
        output: the folder. overwrite: whether an existing one may be replaced.
        inputs: files and folders that are read, and so must not lie inside it.

    Raises:
        OutputError: it exists and may not be replaced, was not written by geolora, holds an input,
            or its parent cannot be written.
    """
    output = Path(output)
    if output.exists():
        if not overwrite:
            raise OutputError(
                f"`--output`: {output} exists. Choose another folder, or add --overwrite."
            )
        resolved = output.resolve()
        for path in map(Path, inputs):
            if path.exists() and resolved in (path.resolve(), *path.resolve().parents):
                raise OutputError(
                    f"`--output`: {output} holds {path}, which is read. Choose another."
                )
        known = output.is_dir() and any((output / name).exists() for name in OURS)
        if not known and not (output.is_dir() and not any(output.iterdir())):
            raise OutputError(
                f"`--output`: {output} was not written by geolora, so --overwrite leaves it alone. "
                "Choose another folder."
            )
    parent = next(folder for folder in (output.absolute()).parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"`--output`: {output} cannot be made in {parent}. Choose another folder."
        )


def remove_folder(output: str | Path) -> None:
    """Remove a folder that `check_output` has passed."""
    output = Path(output)
    if output.is_symlink():
        output.unlink()
    elif output.exists():
        shutil.rmtree(output)


def empty_folder(folder: Path) -> None:
    """Remove what is in a folder that `check_output` has passed and that is held; the hold stays."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, where the system can (not on Windows).

    Raises:
        OutputError: another process works in it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"`--output`: another process works in {folder}. Wait for it, or choose another."
            ) from error
        yield
        (folder / LOCK).unlink(missing_ok=True)


@contextmanager
def naming_disk_errors(output: str | Path) -> Iterator[None]:
    """Turn a full disk and missing rights, from whatever library writes, into `OutputError`.

    What was whole before stays: checkpoints that are sealed, files that are replaced at once.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        chain = [error, error.__cause__, error.__context__]
        codes = {e.errno for e in chain if isinstance(e, OSError)}
        codes |= {int(code) for e in chain for code in OS_ERROR.findall(str(e))}
        torch_failed = any("inline_container" in str(e) for e in chain)  # torch.save says no more
        if codes & NO_ROOM or torch_failed:
            what, do = "there is no space left", "Free some, and start the same command again"
        elif codes & NO_RIGHT:
            what, do = "it may not be written", "Choose another folder"
        else:
            raise
        raise OutputError(f"`--output`: {output}: {what}. {do}.") from error
