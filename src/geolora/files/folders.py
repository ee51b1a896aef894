"""Folders that one process holds, and adapters that take the place of others at once."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geolora.errors import OutputError
from geolora.files.ours import ADAPTER, FILE, LOCK, entry, place_in_order
from geolora.files.writing import PARTIAL, files_in, flush

REPLACED = ".replaced"
"""Ends the name of a folder that another one takes the place of."""


@contextmanager
def alone(folder: Path, lock: str = LOCK) -> Iterator[None]:
    """Hold a folder for this process, where the system can (not on Windows).

    Raises:
        OutputError: another process works in it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / lock
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks
            held = True
        if not held:
            raise OutputError(
                f"`--output`: another process works in {folder}. Wait for it, or choose another."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, fresh: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write an adapter into, which takes the place of another one at once.

    Where the block fails, `folder` is as before. Files in it that are not of an adapter stay in it. At
    every moment, a kill included, it holds the old adapter or the new one, never some of both.

    Args:
        fresh: whether an adapter that has come to be there is not to be replaced.

    Raises:
        OutputError: it cannot or must not be replaced, or another process is replacing it.
    """
    folder = folder.resolve()
    restore(folder)
    # beside it; but inside where nothing is replaced: it may be mounted, or in a folder of somebody else
    beside = folder if folder.is_dir() and not _has_adapter(folder) else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    new = beside / f".{folder.name}{PARTIAL}"
    with alone(beside, f".{folder.name}{LOCK}"):
        _remove_ours(new)
        if fresh and _has_adapter(folder):
            raise OutputError(f"`--output`: {folder} exists. Choose another, or add --overwrite.")
        _refuse_if_in_use(folder)
        new.mkdir()
        try:
            yield new
            flush(new)
            _put(new, folder)
        finally:
            _remove_ours(new)


def restore(folder: Path) -> None:
    """Put back a folder that was being replaced when the process was killed, and tidy what it left."""
    lock, new, old = (f".{folder.name}{end}" for end in (LOCK, PARTIAL, REPLACED))
    for beside in (folder.parent, folder):
        if any((beside / name).exists() for name in (lock, new, old)):
            with contextlib.suppress(OSError), alone(beside, lock):  # or another process is at it
                if (beside / old).exists() and not folder.exists():
                    (beside / old).rename(folder)
                _remove_ours(beside / old)
                _remove_ours(beside / new)


def _put(new: Path, folder: Path) -> None:
    """Put a whole folder in the place of another, whose other files it takes over."""
    if not folder.exists():
        new.rename(folder)
    elif not _has_adapter(folder):
        for path in sorted(files_in(new), key=place_in_order):
            place = folder / path.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    else:
        rest = new.with_name(f".{folder.name}{REPLACED}")
        _carry(folder, new, ADAPTER)
        if not _exchange(new, folder):
            folder.rename(rest)
            new.rename(folder)
            _remove_ours(rest)


def _refuse_if_in_use(folder: Path) -> None:
    if _has_adapter(folder) and (folder.is_mount() or Path.cwd().is_relative_to(folder)):
        raise OutputError(
            f"{folder} cannot be replaced at once: it is mounted, or the folder you are in. Choose "
            "another, or start from elsewhere."
        )


def _has_adapter(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors")
    )


def _carry(old: Path, new: Path, layout: dict[str, Any]) -> None:
    """Link, or copy, into a new folder what in the old one is not of the layout."""
    for path in old.iterdir():
        inner = entry(layout, path.name)
        place = new / path.name
        if path.is_dir() and not path.is_symlink():
            place.mkdir(exist_ok=True)
            _carry(path, place, inner or {})
            shutil.copystat(path, place)
        elif inner is not FILE and not place.exists():
            try:
                os.link(path, place, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(path, place, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system can (Linux)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, bytes(one), here, bytes(other), swap)


def _remove_ours(folder: Path) -> None:
    """Remove a folder beside another that only we make, whole."""
    shutil.rmtree(folder, ignore_errors=True)
