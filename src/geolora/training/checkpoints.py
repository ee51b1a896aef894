"""Checkpoints of a run: sealed when whole, checked before use, one more when a run is stopped.

Trainer writes a checkpoint file by file; a process that is killed meanwhile leaves a torn one. A seal,
written last and at once, holds the size and hash of every file and which run it belongs to.
"""

import re
import signal
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from geolora import processes
from geolora.errors import CheckpointWarning, OutputError
from geolora.files.ours import CHECKPOINT, SEAL, is_empty, remove_written
from geolora.files.reading import read_json
from geolora.files.writing import flush, write_json
from geolora.training.identity import digest

FOREIGN = "belongs to another run"


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint."""


def seal(checkpoint: Path, run: str) -> None:
    """Mark a checkpoint as whole.

    Args:
        checkpoint: its folder; all files are on disk when this returns.
        run: what identifies the run, a hash of its settings and data.
    """
    flush(checkpoint)
    paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL]
    files = {path.relative_to(checkpoint).as_posix(): digest(path) for path in sorted(paths)}
    write_json(checkpoint / SEAL, {"run": run, "files": files})


def rotate(folder: Path, run: str, newest: Path) -> None:
    """Keep the newest checkpoint of a run, just sealed, and the whole one before it; drop others.

    What belongs to another run is left alone.
    """
    before = None
    for path in sorted(_steps(folder).values(), key=step_of, reverse=True):
        if path == newest:
            continue
        problem = flaw(path, run)
        if problem is None and before is None and step_of(path) < step_of(newest):
            before = path
        elif problem != FOREIGN:
            remove_written(path, CHECKPOINT)


def flaw(checkpoint: Path, run: str) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it can be used."""
    try:
        sealed = read_json(checkpoint / SEAL)
        files, owner = dict(sealed["files"]), sealed["run"]
    except FileNotFoundError:
        return "was not written to its end"
    except (OSError, ValueError, KeyError, TypeError):
        return f"has an unreadable {SEAL}"
    if owner != run:
        return FOREIGN
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"has lost {name}"
        if digest(path) != expected:
            return f"has a changed or torn {name}"
    return None


def latest(folder: Path, run: str) -> Path | None:
    """The newest usable checkpoint of a run; what is not usable is named in a warning.

    Args:
        folder: where `checkpoint-N` folders lie; need not exist.
        run: as in `seal`.

    Raises:
        OutputError: there is none, but some of another run, which would be lost.
    """
    by_step = _steps(folder)
    problems = []
    for step in sorted(by_step, reverse=True):
        problems.append(flaw(by_step[step], run))
        if problems[-1] is None:
            return by_step[step]
        warnings.warn(f"{by_step[step]} {problems[-1]}: not used.", CheckpointWarning, stacklevel=2)
    if FOREIGN in problems:
        raise OutputError(
            f"`--output`: {folder} holds checkpoints of another run. Choose another folder, or add "
            "--overwrite to lose them."
        )
    return None


def any_sealed(folder: Path) -> bool:
    """Whether there is a whole checkpoint, as between the first save of a run and its very end."""
    return any((path / SEAL).exists() for path in _steps(folder).values())


def step_of(checkpoint: Path | None) -> int:
    """Steps done at a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def checkpoint_callback(run: str, can_resume: bool = True) -> Any:
    """A Trainer callback that seals every checkpoint, and saves one when the run is to stop.

    The first SIGINT (Ctrl-C) or SIGTERM lets the step end, saves and ends training, with `stopped`
    set to the step; a second one ends the process at once, as without this callback. The last
    step is saved too, so that whatever comes after training can be done again.

    Args:
        run: as in `seal`.
        can_resume: False for a method that no checkpoint can continue: nothing is saved.
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
            self.restore_handlers()
            name, act = signal.Signals(number).name, "saving" if can_resume else "stopping"
            warnings.warn(
                f"{name}: {act} after this step; again to quit at once.",
                CheckpointWarning,
                stacklevel=2,
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            asked = processes.true_on_any(self.asked)
            if asked or state.global_step == state.max_steps:
                control.should_save = can_resume
            if asked:
                control.should_training_stop = True
                self.stopped = state.global_step
            # Trainer's checkpoints hold no loss: what is logged after one starts from it
            control.should_log |= control.should_save

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            processes.wait_for_all()  # every process writes a file of its own
            if processes.is_first():
                seal(newest, run)
                rotate(folder, run, newest)
            processes.wait_for_all()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.restore_handlers()

        def restore_handlers(self) -> None:
            """Let the signals do again what they did before."""
            for number, handler in (self.before or {}).items():
                signal.signal(number, handler)
            self.before = None

    return Checkpoints()


def _steps(folder: Path) -> dict[int, Path]:
    """Checkpoints by step."""
    return {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and not is_empty(path)
    }
