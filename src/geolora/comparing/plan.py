"""What `geolora compare` runs: a grid of methods, step sizes, seeds and tasks, read from YAML."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from geolora.errors import SettingError, shown
from geolora.settings.strict_yaml import (
    mapping,
    of_type,
    read_yaml,
    refuse_unknown_keys,
    settings_of,
)
from geolora.settings.train_config import TrainConfig

KEYS = ("output", "common", "tasks", "methods", "seeds", "choose_on", "against")
RUNNING = "running"
"""Folder of runs that are not on file yet."""
GRID = ("seed", "output", "overwrite")
"""Settings of a run that the grid gives."""
OF_TASKS = (
    "train", "eval", "train_rows", "task", "text", "text_pair", "image", "label", "prompt", "completion",
    "packing", "max_new_tokens", "metric",
)  # fmt: skip
"""Settings that all methods share on a task."""
MOST_RUNS = 100_000
"""Cells of a grid."""
NOT_IN_NAMES = frozenset('/\\:*?"<>|')
"""What no system, or not every one, takes in the name of a folder."""
LONGEST_NAME = 100
"""Bytes of a name."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE | re.ASCII)
"""Names of devices on Windows."""


class Cell(NamedTuple):
    """One run of the grid."""

    task: str
    method: str
    lr: float | None
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Where its file lies under `runs/`, without the suffix, and under `running/` what it trains in."""
        return _name(self.task, self.method, self.lr, self.seed)


def _name(task: str, method: str, lr: float | None, seed: int) -> str:
    return f"{task}/{method}/lr-{'default' if lr is None else f'{lr:g}'}/seed-{seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison: its cells in the order they are run, and how they are judged.

    Attributes:
        choose_on: share of the training rows that choose the step size.
        against: the method the others are compared with.
    """

    output: Path
    cells: list[Cell]
    choose_on: float
    against: str


def read_plan(path: str | Path) -> Plan:
    """The comparison a YAML file describes.

        output: out                         # folder of runs, table and figures
        common: {model: my-model, max_steps: 200}    # settings of `geolora train` for all runs
        tasks:                              # a name and its settings each
          reviews: {train: train.jsonl, eval: dev.jsonl}
        methods:                            # a name and its settings each; lr may be a list
          lora: {rank: 8, lr: [1e-3, 3e-3]}
          ours: {method: geolora, rank: 16}
        seeds: [0, 1, 2]
        choose_on: 0.1                      # share of the training rows that choose lr
        against: lora                       # the first method if not given

    A setting of a method wins over one of a task, and that over one in common. Paths are relative
    to where the command runs, as for `geolora train`.

    Raises:
        SettingError: an unknown key, a value of another type, or a key at the wrong place.
    """
    where = str(path)
    given = read_yaml(path)
    refuse_unknown_keys(given, KEYS, where)
    for key in ("output", "tasks", "methods"):
        if key not in given:
            raise SettingError(f"{where}: `{key}` must be given.")
    output = Path(of_type(given["output"], str, f"{where}: `output`"))
    common = _settings(given.get("common", {}), f"{where}: common", {})
    tasks = mapping(given["tasks"], f"{where}: `tasks`")
    methods = mapping(given["methods"], f"{where}: `methods`")
    seeds = given.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds:
        raise SettingError(f"{where}: `seeds` must be a list of whole numbers; got {seeds!r}.")
    seeds = [of_type(seed, int, f"{where}: `seeds`") for seed in seeds]
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise SettingError(
            f"{where}: `seeds` must be 0 or above and below 2^32; got {shown(wrong[0])}."
        )
    for kind, names in (("tasks", tasks), ("methods", methods)):
        _demand_folder_names(names, f"{where}: {kind}")
    choose_on = of_type(given.get("choose_on", 0.1), float, f"{where}: `choose_on`")
    if not 0 < choose_on < 1:
        raise SettingError(f"{where}: `choose_on` must be between 0 and 1; got {choose_on:g}.")
    against = of_type(given.get("against", next(iter(methods), "")), str, f"{where}: `against`")
    if not tasks or not methods:
        raise SettingError(f"{where}: `tasks` and `methods` must have one entry or more.")
    refuse_unknown_keys({against: None}, methods, f"{where}: `against`")

    cells = []
    for seed in seeds:  # outermost: a table of fewer seeds comes first
        for task, task_given in tasks.items():
            of_task = _settings(task_given, f"{where}: tasks: {task}", common)
            for method, method_given in methods.items():
                here = f"{where}: methods: {method}"
                settings, lrs = _of_method(method, method_given, of_task, here)
                if len(cells) + len(lrs) > MOST_RUNS:
                    raise SettingError(
                        f"{where}: seeds, tasks, methods and step sizes must make {MOST_RUNS:,} runs at most. "
                        "Take some out."
                    )
                for lr in lrs:
                    place = output / RUNNING / _name(task, method, lr, seed)
                    of_cell = {"lr": lr, "seed": seed, "output": str(place)}
                    config = TrainConfig(**{**settings, **of_cell})
                    cells.append(Cell(task, method, lr, seed, config))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise SettingError(f"{where}: `seeds` and `lr` must not name a value twice.")
    return Plan(output, cells, choose_on, against)


def _demand_folder_names(names: Iterable[str], where: str) -> None:
    """Raise `SettingError` where a name is not that of one folder on every system, or two differ by case alone."""
    seen: dict[str, str] = {}
    for name in names:
        if (
            name.strip(" ").rstrip(".") != name  # empty, `.` and `..` too
            or not name
            or not name.isprintable()
            or NOT_IN_NAMES & set(name)
            or len(name.encode()) > LONGEST_NAME
            or RESERVED.fullmatch(name)
        ):
            raise SettingError(
                f"{where}: {shown(name)} must be a name that a folder can have: up to {LONGEST_NAME} bytes, none of "
                f"{' '.join(sorted(NOT_IN_NAMES))}, no blank or dot at the end. Rename it."
            )
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in seen:
            raise SettingError(
                f"{where}: {shown(seen[plain])} and {shown(name)} would be one folder where a disk does not tell "
                "them apart. Rename one."
            )
        seen[plain] = name


def _of_method(
    name: str, given: Any, of_task: dict[str, Any], where: str
) -> tuple[dict[str, Any], list[float | None]]:
    """Settings of a method on a task, and the step sizes it is run with."""
    listed, lrs = _lrs(given, where)
    own = _settings(listed, where, {})
    if misplaced := [key for key in OF_TASKS if key in own]:
        raise SettingError(f"{where}: `{misplaced[0]}` belongs to a task.")
    settings = {"method": name, **of_task, **own}
    return settings, [settings.get("lr")] if lrs is None else [*lrs]


def _settings(given: Any, where: str, below: dict[str, Any]) -> dict[str, Any]:
    """Settings of one level over those of the levels below."""
    settings = settings_of(mapping(given, where) if given is not None else {}, TrainConfig, where)
    for key in GRID:
        if key in settings:
            raise SettingError(f"{where}: `{key}` belongs to the comparison, not to a run.")
    return {**below, **settings}


def _lrs(given: Any, where: str) -> tuple[dict[str, Any], list[float] | None]:
    """A method's settings without `lr`, and its list of step sizes where it has one."""
    settings = mapping(given, where) if given is not None else {}
    if not isinstance(settings.get("lr"), list):
        return settings, None
    lrs = [of_type(lr, float, f"{where}: `lr`") for lr in settings["lr"]]
    if not lrs:
        raise SettingError(f"{where}: `lr` must have one step size or more.")
    return {key: value for key, value in settings.items() if key != "lr"}, lrs
