"""The seconds of every step of a run, those before a stop included."""

import time
from pathlib import Path
from typing import Any

from geolora import processes
from geolora.files.reading import read_json
from geolora.files.writing import write_json

SECONDS = "seconds.json"
"""Seconds of every step so far, in a checkpoint."""


def clock_callback(checkpoint: Path | None) -> Any:
    """A Trainer callback that takes the `seconds` of every step, and keeps them in checkpoints.

    Args:
        checkpoint: the one that is gone on from.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            if checkpoint is not None:
                self.seconds = read_json(checkpoint / SECONDS)
            self.last = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if processes.is_first():
                write_json(folder / SECONDS, self.seconds, indent=None)

    return Clock()
