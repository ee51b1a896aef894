"""Whether an output folder holds a stopped run, and whether and where it is gone on with."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from geolora import processes
from geolora.errors import DataError, ModelError, OutputError
from geolora.files.folders import alone
from geolora.files.ours import LOCK, RUN, RUN_MARK, holds, remove_written
from geolora.files.output_folder import check_output
from geolora.files.reading import read_json
from geolora.files.writing import write_json
from geolora.settings.train_config import DEFAULTS, TrainConfig
from geolora.training.checkpoints import any_sealed, latest
from geolora.training.identity import base_id, base_id_of_0_1, run_id

DEFAULTS_OF_0_1 = {"tail": 0.25}
"""Defaults that are others now: a run stopped then goes on with what it was begun with."""
LEFTOVERS = ("checkpoints", "start")
"""Folders that only an unfinished run has."""
NOT_SETTINGS = ("overwrite", "data", "base", "run")
"""Entries of run.json that are no settings, or make no difference."""


def unfinished(config: TrainConfig) -> bool:
    """Whether the output folder holds a run of the same settings that was stopped."""
    saved = _stopped(config)
    return saved is not None and not _changed(config, saved)


def refuse_changed(config: TrainConfig) -> None:
    """Raise `OutputError` where the folder holds a stopped run of other settings."""
    saved = _stopped(config)
    changed = _changed(config, saved) if saved else []
    if saved and changed and changed != ["output"]:
        flag = changed[0].replace("_", "-")
        raise OutputError(
            f"`--output`: {config.output} holds a stopped run with --{flag} "
            f"{saved.get(changed[0])}, now {getattr(config, changed[0], None)}. Give the same flags "
            "to go on, choose another folder, or add --overwrite to lose it."
        )


def tidy(config: TrainConfig) -> None:
    """Remove what a process that was killed at the very end of a run has left in the output folder."""
    output = Path(config.output)
    left = any((output / name).exists() for name in (*LEFTOVERS, LOCK))
    if left and holds(output, "run") and not _is_stopped(output):
        with suppress(OutputError), alone(output):
            remove_leftovers(output)


def remove_leftovers(output: Path) -> None:
    """Remove what a run that has ended needs no more."""
    for name in LEFTOVERS:
        remove_written(output / name, RUN[name])


class Opened(NamedTuple):
    """An output folder that is held.

    Attributes:
        checkpoint: where the run goes on from. run: its id, which its checkpoints have.
    """

    checkpoint: Path | None
    run: str


@contextmanager
def opened(config: TrainConfig, data_id: str) -> Iterator[Opened]:
    """Hold the output folder for this run, begun or gone on with, and write down there what run it is.

    What geolora wrote is removed from it where there is no checkpoint. Of several processes the first
    one writes, when all have seen what the folder held.

    Raises:
        DataError, ModelError: a stopped run over other data or another base.
        OutputError: checkpoints of another run, or another process works in the folder.
    """
    output, base = Path(config.output), base_id(config.model)
    if processes.is_first():
        output.mkdir(parents=True, exist_ok=True)
    processes.wait_for_all()
    with alone(output) if processes.is_first() else nullcontext():
        processes.wait_for_all()  # it is held: what is there now, also by a run that has ended since it was checked
        found = None if config.overwrite else _found(config, data_id, base)
        if found is None:
            check_output(output, config.overwrite)
        now = found or Opened(None, run_id(config, data_id, base))
        processes.wait_for_all()
        if processes.is_first():
            if now.checkpoint is None:
                # the mark is replaced, and there at every moment
                remove_written(output, RUN, but=RUN_MARK)
            write_json(
                output / RUN_MARK, {**asdict(config), "data": data_id, "base": base, "run": now.run}
            )
        processes.wait_for_all()
        yield now


def _found(config: TrainConfig, data_id: str, base: str) -> Opened | None:
    """The stopped run of these settings, data and base, and its last usable checkpoint."""
    saved = _stopped(config)
    if saved is None or _changed(config, saved):
        return None
    do = "Choose another folder, or add --overwrite."
    if saved.get("data") != data_id:
        raise DataError(
            f"`--output`: {config.output} holds an unfinished run of the same flags over other data. {do}"
        )
    if saved.get("base", base) != base:
        raise ModelError(
            f"`--model`: {config.model} has changed since the run in {config.output} was stopped. "
            f"Put it back as it was; or choose another folder, or add --overwrite."
        )
    run = saved.get("run")
    if run is None:
        then = {k: saved.get(k, v) for k, v in DEFAULTS_OF_0_1.items()}
        run = run_id(replace(config, **then), data_id, base_id_of_0_1(config.model))
    return Opened(latest(Path(config.output) / "checkpoints", run), run)


def _stopped(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run that was stopped in the output folder, whatever they are."""
    output = Path(config.output)
    return read_json(output / RUN_MARK) if holds(output, "run") and _is_stopped(output) else None


def _is_stopped(output: Path) -> bool:
    return not (output / "report.json").exists() or any_sealed(output / "checkpoints")


def _changed(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    """Names of the settings that are not as saved; what may differ is left out."""
    known = {key: value for key, value in saved.items() if key not in NOT_SETTINGS}
    theirs = {**DEFAULTS, **known}  # a run made before a setting was there had its default
    ours = asdict(config)
    if "run" not in saved:  # made by 0.1.0
        theirs |= {k: DEFAULTS[k] for k, v in DEFAULTS_OF_0_1.items() if theirs[k] == v}
    return sorted(k for k in theirs if k not in NOT_SETTINGS and ours.get(k, ...) != theirs[k])
