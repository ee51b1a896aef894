"""Checkpoints of a run: sealed when whole, checked before use, one more when a run is stopped.

Trainer writes a checkpoint file by file; a process that is killed meanwhile leaves a torn one. A seal,
written last and at once, holds the size and hash of every file and which run it belongs to.
"""

import hashlib
import json
import os
import re
import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from geolora.errors import CheckpointWarning

SEAL = "geolora.json"


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint."""


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON so that a reader sees the whole file or none, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def seal(checkpoint: Path, run: str) -> None:
    """Mark a checkpoint as whole.

    Args:
        checkpoint: its folder; all files are on disk when this returns.
        run: what identifies the run, a hash of its settings and data.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                digest = _digest(file)
            files[path.relative_to(checkpoint).as_posix()] = digest.hexdigest()
    write_json(checkpoint / SEAL, {"run": run, "files": files})


def flaw(checkpoint: Path, run: str) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it can be used."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        files, owner = dict(sealed["files"]), sealed["run"]
    except FileNotFoundError:
        return "was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"has an unreadable {SEAL}"
    if owner != run:
        return "belongs to another run"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"has lost {name}"
        with path.open("rb") as file:
            if _digest(file).hexdigest() != expected:
                return f"has a changed or torn {name}"
    return None


def latest(folder: Path, run: str) -> Path | None:
    """The newest usable checkpoint of a run; what is not usable is named in a warning.

    Args:
        folder: where `checkpoint-N` folders lie; need not exist.
        run: as in `seal`.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(found, reverse=True):
        problem = flaw(found[step], run)
        if problem is None:
            return found[step]
        warnings.warn(f"{found[step]} {problem}: not used.", CheckpointWarning, stacklevel=2)
    return None


def step_of(checkpoint: Path | None) -> int:
    """Steps done at a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def checkpoint_callback(run: str) -> Any:
    """A Trainer callback that seals every checkpoint, and saves one when the run is to stop.

    The first SIGINT (Ctrl-C) or SIGTERM lets the step end, saves and ends training, with `stopped`
    set to the step; a second one ends the process at once, as without this callback.
    """
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        stopped: int | None = None
        asked = False
        before: dict[int, Any] | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.before = {}
            for number in (signal.SIGINT, signal.SIGTERM):
                try:
                    self.before[number] = signal.signal(number, self.ask)
                except ValueError:  # not the main thread: its owner handles signals
                    return

        def ask(self, number: int, _frame: FrameType | None) -> None:
            self.asked = True
            self.give_back()
            name = signal.Signals(number).name
            warnings.warn(
                f"{name}: saving after this step; again to quit at once.",
                CheckpointWarning,
                stacklevel=2,
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if self.asked and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
                self.stopped = state.global_step

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", run)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.give_back()

        def give_back(self) -> None:
            for number, handler in (self.before or {}).items():
                signal.signal(number, handler)
            self.before = None

    return Checkpoints()


def _digest(file: Any) -> Any:
    """SHA-256 of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest
