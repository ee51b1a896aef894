"""Everything that is refused before a run loads or writes anything: flags that do not go together or cannot work."""

import math
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from geolora import processes
from geolora.errors import ModelError, OutputError, SettingError, nearest, shown
from geolora.files.output_folder import can_be_written_down, check_name, check_output
from geolora.files.reading import is_folder
from geolora.settings.train_config import DEFAULTS, LOGGERS, METRICS_OF, ONLY_FOR, TrainConfig
from geolora.training.recipes import recipe_of
from geolora.training.resume import refuse_changed, tidy, unfinished

ANY_NUMBER = ("seed", "tail", "lr", "rest_lr")
"""Numbers that need not be above 0; where they have limits, these are checked one by one."""


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded or written.

    Raises:
        SettingError: a flag out of its range, or one that does not belong to the task or method.
        ModelError: no model is named. OutputError: an output folder that exists.
    """
    _check_ranges(config)
    _check_task(config)
    _check_loggers(config.report_to)
    if config.batch_size % microbatches(config):
        raise SettingError(
            f"`--batch-size` must be a multiple of {microbatches(config)} (processes times "
            f"--gradient-accumulation); got {config.batch_size}."
        )
    recipe_of(config).check()
    _check_place(config)
    if not config.overwrite:
        refuse_changed(config)
    if not unfinished(config) or config.overwrite:
        tidy(config)
        inputs = (config.model, config.train, config.eval)
        check_output(config.output, config.overwrite, "run", inputs)


def microbatches(config: TrainConfig) -> int:
    """Into how many batches the rows of a step are divided, over all processes."""
    return processes.count() * config.gradient_accumulation


def planned_steps(config: TrainConfig, rows: int) -> int:
    """Number of optimizer steps of a run."""
    if config.max_steps:
        return config.max_steps
    return max(1, round(config.epochs * -(-rows // config.batch_size)))


def _check_ranges(config: TrainConfig) -> None:
    """Refuse a value that its flag alone rules out."""
    for spec in fields(config):
        value, choices = getattr(config, spec.name), spec.metadata["choices"]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and spec.name not in ANY_NUMBER and not value > 0:
            raise SettingError(f"`{_flag(spec.name)}` must be above 0; got {value}.")
        if choices and value not in (None, *choices):
            known = ", ".join(choices)
            raise SettingError(
                f"`{_flag(spec.name)}` must be one of {known}; got {value}."
                f"{nearest(str(value), choices)}"
            )
    if not config.model:
        raise ModelError("`--model` must be given: a local folder or a hub name.")
    if not 0 <= config.seed < 2**32:
        raise SettingError(f"`--seed` must be 0 or above and below 2^32; got {config.seed}.")
    for flag, value in (("--lr", config.lr), ("--rest-lr", config.rest_lr)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise SettingError(f"`{flag}` must be a number >= 0; got {value}.")
    if not math.isfinite(config.epochs):
        raise SettingError(f"`--epochs` must be finite; got {config.epochs}.")


def _check_task(config: TrainConfig) -> None:
    """Refuse a metric or a flag of another task."""
    if config.metric not in (None, *METRICS_OF[config.task]):
        raise SettingError(
            f"`--metric` must be one of {', '.join(METRICS_OF[config.task])} for {config.task}; "
            f"got {config.metric}."
        )
    for name, tasks in ONLY_FOR.items():
        if config.task not in tasks and getattr(config, name) != DEFAULTS[name]:
            raise SettingError(
                f"`{_flag(name)}` belongs to --task {', '.join(tasks)}; got {config.task}."
            )


def _check_place(config: TrainConfig) -> None:
    """Refuse paths that cannot be written down, and an output among the files that are trained on."""
    check_name(config.output, "`--output`")
    for name in ("model", "train", "eval"):
        value = getattr(config, name)
        if not can_be_written_down(value):
            raise SettingError(
                f"`{_flag(name)}` must be a path in UTF-8; got {shown(value)}. Rename it."
            )
    for name in ("train", "eval"):
        given = getattr(config, name)  # "" where rows come from a program: it is no folder
        folder = Path(given)
        if (
            given
            and is_folder(folder)
            and Path(config.output).resolve().is_relative_to(folder.resolve())
        ):
            raise OutputError(
                f"`--output`: {config.output} lies in {folder}, which is read. Choose another folder."
            )


def _check_loggers(report_to: str) -> None:
    """Refuse loggers that are unknown, not installed, or named together with none."""
    names = report_to.split(",")
    if "none" in names and report_to != "none":
        raise SettingError(f"`--report-to` must be none or loggers; got {report_to}.")
    for name in names:
        if name not in LOGGERS:
            raise SettingError(
                f"`--report-to` must be of {', '.join(LOGGERS)}; got {name}.{nearest(name, LOGGERS)}"
            )
        if LOGGERS[name] and not any(map(find_spec, LOGGERS[name])):
            raise SettingError(
                f"`--report-to` {name} needs the package `{LOGGERS[name][0]}`. Install it."
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
