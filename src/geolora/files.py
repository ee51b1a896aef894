"""Files and folders that are written: whole or not at all, replaced at once, and removed only where they are ours.

| folder     | how it is known as ours                     | what of it is ours         |
|------------|---------------------------------------------|----------------------------|
| run        | run.json with the settings of a run         | `RUN`                      |
| demo       | demo.json, `{}` or the demo's results       | `DEMO`                     |
| adapter    | geolora/probes.safetensors                  | `ADAPTER`                  |
| comparison | comparison.json, `{}` or with rows          | nothing: never removed     |

Whatever else lies in such a folder stays when geolora removes or replaces what it wrote there.
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from geolora.errors import OutputError, shown

LOCK = ".lock"
"""Held by the process that works in a folder."""
PARTIAL = ".partial"
"""Ends the name of what is not written to its end."""
REPLACED = ".replaced"
"""Ends the name of a folder that another one takes the place of."""

ALWAYS_UNPACKED = 2**28
"""Bytes that any file may unpack to."""

FILE: dict[str, Any] = {}
"""Stands for a file in the layouts below; any other value is what lies in a folder."""


def _files(names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), FILE)


PROCESSOR = _files(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt "
    "merges.txt bpe.codes *.model *.spm *.tiktoken chat_template.jinja chat_template.json "
    "preprocessor_config.json processor_config.json video_preprocessor_config.json"
)
"""What tokenizers and image processors save."""
ADAPTER: dict[str, Any] = {
    **PROCESSOR,
    **_files("adapter_model.safetensors .tmp?????? README.md adapter_config.json"),
    "geolora": _files("probes.safetensors export.json"),
}
CHECKPOINT: dict[str, Any] = {
    **ADAPTER,
    **_files("optimizer.pt optimizer.bin scheduler.pt scaler.pt rng_state*.pth trainer_state.json"),
    **_files("training_args.bin seconds.json geolora.json"),
}
"""What Trainer saves, and we beside it."""
RUN: dict[str, Any] = {
    **_files("report.json history.json labels.json config.yaml run.json report.html ranks.png"),
    **_files(".adapter.lock"),
    **dict.fromkeys(["adapter", ".adapter.partial", ".adapter.replaced", "start"], ADAPTER),
    "checkpoints": {"checkpoint-*": CHECKPOINT, "tmp-checkpoint-*": CHECKPOINT},
}
DEMO: dict[str, Any] = {"table.txt": FILE, "lora": RUN, "geolora": RUN, "demo.json": FILE}
SEAL = "geolora.json"
"""Says that a checkpoint is whole; written last and removed first."""
MARKS = ("probes.safetensors", "adapter_config.json", "run.json", "demo.json")
"""Written last and removed last, in this order: while one is there, the folder is known for what it is."""


# ---- what is there ---------------------------------------------------------------------------------


def exists(path: str | Path) -> bool:
    """Whether something is there; False for a name that no system takes, of which `Path.exists` raises."""
    return os.path.exists(path)


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False for a name that no system takes."""
    return os.path.isdir(path)


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False for a name that no system takes."""
    return os.path.isfile(path)


def most_unpacked(path: Path) -> int:
    """Bytes that what is in a compressed file may take: a hundred times its own size, or `ALWAYS_UNPACKED`.

    Real rows and pictures shrink to a tenth at best; four megabytes of nothing but zeros are four gigabytes.
    """
    return max(ALWAYS_UNPACKED, 100 * path.stat().st_size)


# ---- files --------------------------------------------------------------------------------------


class KeyTwice(ValueError):
    """A key that stands twice in an object, of which Python would take the second."""


def read_json(path: Path, finite: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        finite: refuse NaN and Infinity, which are not JSON, and numbers that would be infinite. Losses may be.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or not JSON (as `parse_json`).
    """
    return parse_json(path.read_text(encoding="utf-8"), finite)


def parse_json(text: str, finite: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        finite: as in `read_json`.

    Raises:
        KeyTwice: an object has a key twice.
        ValueError: it is not JSON, or nested too deeply to be read (json raises RecursionError).
    """
    numbers: dict[str, Any] = {"parse_constant": _finite, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_with_keys_once, **numbers)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise KeyTwice(f"the key {shown(key)} stands twice")
    return result


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
    for path in folder.rglob("*"):
        if path.is_file():
            _bring_to_disk(path)


def _bring_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# ---- folders: whose they are --------------------------------------------------------------------


def holds(folder: Path, kind: str) -> bool:
    """Whether geolora wrote a folder, by the mark in it; kinds are those of the table above."""
    if kind == "adapter":
        return (folder / "geolora" / "probes.safetensors").is_file()
    keys = {"run": {"model", "train", "method"}, "demo": {"floor"}, "comparison": {"rows"}}[kind]
    try:
        mark = read_json(folder / f"{kind}.json")
    except (OSError, ValueError):
        return False
    begun = mark == {} and kind != "run"
    return isinstance(mark, dict) and (begun or keys <= mark.keys())


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what an interrupted start of ours leaves."""
    return folder.is_dir() and all(path.name.endswith((LOCK, PARTIAL)) for path in folder.iterdir())


def remove_written(folder: Path, layout: dict[str, Any]) -> None:
    """Remove from a folder what geolora wrote, its mark last, and the folder where nothing is left in it.

    Files and folders of other names stay. Of a link the link is removed, not what it leads to.

    Args:
        folder: need not exist. layout: what is ours in it: `RUN`, `ADAPTER` and so on.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir(), key=_place_in_order):
        name = path.name if path.name in layout else path.name.removesuffix(PARTIAL)
        inner = next((layout[p] for p in layout if fnmatchcase(name, p)), None)
        if inner is None:
            continue
        if path.is_symlink() or (path.is_file() and inner is FILE):
            path.unlink()
        elif inner is not FILE:
            remove_written(path, inner)
    with contextlib.suppress(OSError):  # something else lies in it, or it is a link
        folder.rmdir()


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


# ---- folders: replaced at once ------------------------------------------------------------------


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
    beside = folder.parent
    if folder.is_dir() and not _has_adapter(
        folder
    ):  # it may be mounted, or in a folder of somebody else
        beside = folder
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
        for path in sorted(_all_files(new), key=_place_in_order):
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
        inner = next((layout[p] for p in layout if fnmatchcase(path.name, p)), None)
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


def _place_in_order(path: Path) -> int:
    return MARKS.index(path.name) if path.name in MARKS else -1 - (path.name == SEAL)


def _all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove_ours(folder: Path) -> None:
    """Remove a folder beside another that only we make, whole."""
    shutil.rmtree(folder, ignore_errors=True)
