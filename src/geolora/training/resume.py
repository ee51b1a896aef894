"""Whether an output folder holds a stopped run, and whether and where it is gone on with."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geolora import processes
from geolora.errors import DataError, OutputError
from geolora.files import read_json
from geolora.settings.train_config import TrainConfig
from geolora.training.checkpoints import latest
from geolora.training.output_folder import alone, empty_folder

RUN = "run.json"
"""Settings and data of the run of a folder; with report.json beside it, the run has ended."""


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


@contextmanager
def opened(config: TrainConfig, data_id: str, run_id: str) -> Iterator[Path | None]:
    """Hold the output folder for this run; gives the checkpoint to go on from.

    The folder is emptied where there is none. Of several processes the first one empties and holds
    it, when all have seen what it held.

    Raises:
        DataError: a stopped run over other data. OutputError: another process works in the folder.
    """
    output = Path(config.output)
    checkpoint = None if config.overwrite else _checkpoint(config, data_id, run_id)
    processes.wait_for_all()
    if processes.is_first():
        output.mkdir(parents=True, exist_ok=True)
    processes.wait_for_all()
    with alone(output) if processes.is_first() else nullcontext():
        if processes.is_first() and checkpoint is None:
            empty_folder(output)
        processes.wait_for_all()
        yield checkpoint


def _checkpoint(config: TrainConfig, data_id: str, run_id: str) -> Path | None:
    """The last usable checkpoint of a stopped run of these settings and data."""
    saved = _stopped(config)
    if saved is None or _changed(config, saved):
        return None
    if saved.get("data") != data_id:
        raise DataError(
            f"`--output`: {config.output} holds an unfinished run of the same flags over other data. "
            "Choose another folder, or add --overwrite."
        )
    return latest(Path(config.output) / "checkpoints", run_id)


def _stopped(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run that was stopped in the output folder, whatever they are."""
    output = Path(config.output)
    if (output / "report.json").exists():
        return None
    try:
        saved = read_json(output / RUN)
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


def _changed(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    """Names of the settings that are not as saved; what may differ is left out."""
    ours = {key: value for key, value in asdict(config).items() if key != "overwrite"}
    theirs = {key: value for key, value in saved.items() if key not in ("overwrite", "data")}
    return sorted(k for k in {*ours, *theirs} if ours.get(k, ...) != theirs.get(k, ...))
