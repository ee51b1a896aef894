"""`geolora compare`: a grid of methods, step sizes, seeds and tasks, and what follows from it.

Every run is one JSON file under `runs/`; a run that has its file is not run again. A share of the
training rows is held back: the step size of every method is chosen by the score on them (mean over
the seeds), and only then the score on the evaluation set at that step size counts. `plan.py` reads the
grid, `summary.py` computes the numbers of `comparison.json`, `report/comparison.py` draws them.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from geolora import processes
from geolora.comparing.plan import Cell, Plan
from geolora.comparing.summary import summarise
from geolora.errors import GradientError, SettingError
from geolora.files.folders import alone
from geolora.files.ours import COMPARISON_MARK, RUN, RUN_MARK, is_empty, remove_written
from geolora.files.output_folder import check_output, naming_disk_errors
from geolora.files.reading import read_json
from geolora.files.writing import write_json
from geolora.settings.train_config import DEFAULTS, TrainConfig
from geolora.tasks.task import Data, Rows
from geolora.training.check import check
from geolora.training.identity import base_id, base_id_of_0_1
from geolora.training.resume import unfinished
from geolora.training.run import load, train


def run_all(
    plan: Plan,
    say: Callable[[str], None],
    then: Callable[[Path, dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Run every cell that has no file yet, then summarise all.

    Args:
        say: takes a line of progress.
        then: takes the folder and the summary when all is written, while the folder is still held.

    Returns:
        What `comparison.json` holds.

    Raises:
        OutputError: a folder that is not a comparison, or a disk that is full.
        SettingError: a run on disk with other settings; nothing is changed then.
    """
    if processes.count() > 1:
        raise SettingError(
            "compare: must run in one process; got "
            f"{processes.count()}. Start it without torchrun: its runs are small, and made one by one."
        )
    marker = plan.output / COMPARISON_MARK
    check_output(plan.output, True, "comparison")
    data = {cell.task: cell.config for cell in plan.cells}
    loaded = {task: split(load(config), plan.choose_on) for task, config in data.items()}
    todo = [cell for cell in plan.cells if not _done(plan, cell, loaded[cell.task][0])]
    for cell in todo:
        check(replace(cell.config, output=f"{cell.config.output}-to-be"))
    plan.output.mkdir(parents=True, exist_ok=True)
    with naming_disk_errors(plan.output, "`output`"), alone(plan.output):
        if not marker.exists():
            write_json(marker, {})
        for cell in plan.cells:
            if cell not in todo:  # a process that was killed may have left it
                _remove(plan, cell)
        say(f"{len(plan.cells)} runs, {len(plan.cells) - len(todo)} of them done")
        begun = time.perf_counter()
        for number, cell in enumerate(todo, 1):
            result = _run(cell, *loaded[cell.task])
            path = _file(plan, cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result, indent=None)
            _remove(plan, cell)  # only now: a run that is not on file must not be lost
            left = (time.perf_counter() - begun) / number * (len(todo) - number)
            say(f"{number}/{len(todo)}  {cell.name}  {_short(result)}; {left / 60:.0f} min left")
        results = [(cell, read_json(_file(plan, cell))) for cell in plan.cells]
        summary = summarise(results, plan.against, plan.choose_on)
        write_json(marker, summary)
        if then is not None:
            then(plan.output, summary)
    return summary


def split(data: Data, share: float) -> tuple[Data, Rows]:
    """Hold back a share of the training rows, the same ones in every run and for every method."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.train), generator=generator).tolist()
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise SettingError(f"`choose_on`: {len(order)} training rows are too few to divide.")
    back, rest = sorted(order[:count]), sorted(order[count:])
    return Data(data.train.at(rest), data.held_out, data.names), data.train.at(back)


# ---- runs ---------------------------------------------------------------------------------------


def _run(cell: Cell, data: Data, choice: Rows) -> dict[str, Any]:
    """Train one cell, or go on with it; a run that diverges has no scores and says why."""
    config = _to_run(cell.config)
    result: dict[str, Any] = {
        "settings": _stored(cell.config),
        "data": _inputs(data, base_id(cell.config.model)),
        "failure": None,
    }
    try:
        outcome = train(config, data, choice)
    except GradientError as error:
        return {**result, "failure": str(error)}
    return {
        **result,
        "report": {key: value for key, value in outcome.report.items() if key != "command"},
        "choice": outcome.choice,
        "history": outcome.history,
        "predictions": outcome.predictions,
        "targets": outcome.targets,
    }


def _to_run(config: TrainConfig) -> TrainConfig:
    """A cell's settings to go on with, or to begin with, beside what a person may have put into its folder."""
    folder = Path(config.output)
    if unfinished(config):
        return config
    remove_written(folder, RUN)
    if not folder.is_dir() or is_empty(folder):
        return config
    write_json(folder / RUN_MARK, asdict(config))  # the folder is ours
    return replace(config, overwrite=True)


def _remove(plan: Plan, cell: Cell) -> None:
    """Remove what a cell trained in, and the folders around it where nothing else is left in them."""
    folder = Path(cell.config.output)
    remove_written(folder, RUN)
    while folder != plan.output:
        with suppress(OSError):
            folder.rmdir()
        folder = folder.parent


def _done(plan: Plan, cell: Cell, data: Data) -> bool:
    """Whether a cell has its file, and it is of these settings and data."""
    path = _file(plan, cell)
    if not path.exists():
        return False
    try:
        saved = read_json(path)
        settings, theirs = saved["settings"], saved["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is not the file of a run. Remove it.") from error
    ours = _stored(cell.config)
    # a run made before a setting was there had its default
    changed = [key for key in ours if settings.get(key, DEFAULTS[key]) != ours[key]]
    if changed:
        key = changed[0]
        raise SettingError(
            f"{path} was run with `{key}` {settings.get(key)!r}, now it is {ours[key]!r}. "
            "Remove the file, or choose another output."
        )
    bases = (base_id(cell.config.model), base_id_of_0_1(cell.config.model))
    if theirs not in [_inputs(data, base) for base in bases]:
        raise SettingError(
            f"{path} was run on other data or another base. Remove it, or choose another output."
        )
    return True


def _file(plan: Plan, cell: Cell) -> Path:
    return plan.output / "runs" / f"{cell.name}.json"


def _stored(config: TrainConfig) -> dict[str, Any]:
    """Settings that make a run what it is, wherever it is written to."""
    return {
        key: value for key, value in asdict(config).items() if key not in ("output", "overwrite")
    }


def _inputs(data: Data, base: str) -> str:
    """A hash of the data and the base model of a run."""
    return hashlib.sha256(f"{data.digest()} {base}".encode()).hexdigest()


def _short(result: dict[str, Any]) -> str:
    if result["failure"]:
        return "diverged"
    report = result["report"]
    return (
        f"{report['metric']} {report['value']:.4f} ({result['choice']:.4f} on the choosing rows), "
        f"{report['adapter_parameters']:,} parameters, {report['seconds']:.0f} s"
    )
