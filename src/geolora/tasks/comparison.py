"""`geolora compare`: a grid of methods, step sizes, seeds and tasks, and what follows from it.

Every run is one JSON file under `runs/`; a run that has its file is not run again. A part of the
training rows is held back: the step size of every method is chosen by the score on them (mean over
the seeds), and only then the score on the evaluation set at that step size counts. All numbers of the
table are computed here, into `comparison.json`; `report/comparison.py` draws them.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geolora.errors import GradientError, OutputError, SettingError
from geolora.tasks.checkpoints import write_json
from geolora.tasks.config import TrainConfig, check, unfinished
from geolora.tasks.metrics import METRICS
from geolora.tasks.output import alone, check_output, clear, writing
from geolora.tasks.strict_yaml import known_keys, mapping, of_type, read_yaml, settings_of
from geolora.tasks.text_classification import (
    Rows,
    TextData,
    base_id,
    digest_of,
    load,
    train,
)

KEYS = ("output", "common", "tasks", "methods", "seeds", "choose_on", "against")
GRID = ("seed", "output", "overwrite")
"""Settings of a run that the grid gives."""
OF_TASKS = ("train", "eval", "train_rows", "task", "text", "text_pair", "label")
"""Settings that all methods share on a task."""
RESAMPLES = 10_000
INTERVAL = 0.95


class Cell(NamedTuple):
    """One run of the grid."""

    task: str
    method: str
    lr: float | None
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Where its file lies under `runs/`, without the suffix."""
        lr = "default" if self.lr is None else f"{self.lr:g}"
        return f"{self.task}/{self.method}/lr-{lr}/seed-{self.seed}"


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
    known_keys(given, KEYS, where)
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
    choose_on = of_type(given.get("choose_on", 0.1), float, f"{where}: `choose_on`")
    if not 0 < choose_on < 1:
        raise SettingError(f"{where}: `choose_on` must be between 0 and 1; got {choose_on:g}.")
    against = of_type(given.get("against", next(iter(methods), "")), str, f"{where}: `against`")
    if not tasks or not methods:
        raise SettingError(f"{where}: `tasks` and `methods` must have one entry or more.")
    known_keys({against: None}, methods, f"{where}: `against`")

    cells = []
    for seed in seeds:  # outermost: a table of fewer seeds comes first
        for task, task_given in tasks.items():
            of_task = _settings(task_given, f"{where}: tasks: {task}", common)
            for method, method_given in methods.items():
                here = f"{where}: methods: {method}"
                listed, lrs = _lrs(method_given, here)
                own = _settings(listed, here, {})
                if misplaced := [key for key in OF_TASKS if key in own]:
                    raise SettingError(f"{here}: `{misplaced[0]}` belongs to a task.")
                merged = {**of_task, **own}
                merged.setdefault("method", method)
                for lr in lrs if lrs is not None else [merged.get("lr")]:
                    folder = output / "running"
                    settings = {**merged, "lr": lr, "seed": seed, "output": str(folder)}
                    cells.append(Cell(task, method, lr, seed, TrainConfig(**settings)))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise SettingError(f"{where}: `seeds` and `lr` must not name a value twice.")
    return Plan(output, cells, choose_on, against)


def run_all(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every cell that has no file yet, then summarise all.

    Args:
        say: takes a line of progress.

    Returns:
        What `comparison.json` holds.

    Raises:
        OutputError: a folder that is not a comparison, or a disk that is full.
        SettingError: a run on disk with other settings; nothing is changed then.
    """
    marker = plan.output / "comparison.json"
    if plan.output.is_file():
        raise OutputError(f"`output`: {plan.output} is a file. Choose a folder.")
    if plan.output.exists() and any(plan.output.iterdir()) and not marker.exists():
        raise OutputError(
            f"`output`: {plan.output} exists and holds no comparison. Choose another folder."
        )
    data = {cell.task: cell.config for cell in plan.cells}
    loaded = {task: split(load(config), plan.choose_on) for task, config in data.items()}
    todo = [cell for cell in plan.cells if not _done(plan, cell, loaded[cell.task][0])]
    for cell in todo:
        check(replace(cell.config, output=f"{cell.config.output}-to-be"))
    if not plan.output.exists():
        check_output(plan.output, False)
    plan.output.mkdir(parents=True, exist_ok=True)
    with writing(plan.output), alone(plan.output):
        if not marker.exists():
            write_json(marker, {})
        say(f"{len(plan.cells)} runs, {len(plan.cells) - len(todo)} of them done")
        begun = time.perf_counter()
        for number, cell in enumerate(todo, 1):
            result = _run(cell, *loaded[cell.task])
            path = _file(plan, cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result, indent=None)
            left = (time.perf_counter() - begun) / number * (len(todo) - number)
            say(f"{number}/{len(todo)}  {cell.name}  {_short(result)}; {left / 60:.0f} min left")
        results = [(cell, json.loads(_file(plan, cell).read_text())) for cell in plan.cells]
        labels = {task: parts[0].held_out_labels for task, parts in loaded.items()}
        summary = summarise(results, labels, plan.against)
        write_json(marker, summary)
    return summary


def split(data: TextData, share: float) -> tuple[TextData, Rows]:
    """Hold back a share of the training rows, the same ones in every run and for every method."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.train), generator=generator).tolist()
    count = max(1, round(share * len(order)))
    if count >= len(order):
        raise SettingError(f"`choose_on`: {len(order)} training rows are too few to divide.")
    back, rest = sorted(order[:count]), sorted(order[count:])
    kept = TextData(
        [data.train[i] for i in rest],
        [data.train_labels[i] for i in rest],
        data.held_out,
        data.held_out_labels,
        data.names,
    )
    return kept, Rows([data.train[i] for i in back], [data.train_labels[i] for i in back])


# ---- runs ---------------------------------------------------------------------------------------


def _run(cell: Cell, data: TextData, choice: Rows) -> dict[str, Any]:
    """Train one cell, or go on with it; a run that diverges has no scores and says why."""
    if not unfinished(cell.config):
        clear(cell.config.output)
    result: dict[str, Any] = {
        "settings": _stored(cell.config),
        "data": _inputs(cell, data),
        "failure": None,
    }
    try:
        found = train(cell.config, data, choice)
    except GradientError as error:
        clear(cell.config.output)
        return {**result, "failure": str(error)}
    clear(cell.config.output)
    return {
        **result,
        "report": {key: value for key, value in found.report.items() if key != "command"},
        "choice": found.choice,
        "history": found.history,
        "predictions": found.predictions,
    }


def _done(plan: Plan, cell: Cell, data: TextData) -> bool:
    """Whether a cell has its file, and it is of these settings and data."""
    path = _file(plan, cell)
    if not path.exists():
        return False
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        settings, theirs = saved["settings"], saved["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is not the file of a run. Remove it.") from error
    ours = _stored(cell.config)
    changed = [key for key in ours if settings.get(key) != ours[key]]
    if changed:
        key = changed[0]
        raise SettingError(
            f"{path} was run with `{key}` {settings.get(key)!r}, now it is {ours[key]!r}. "
            "Remove the file, or choose another output."
        )
    if theirs != _inputs(cell, data):
        raise SettingError(
            f"{path} was run on other data or another base. Remove it, or choose another output."
        )
    return True


def _file(plan: Plan, cell: Cell) -> Path:
    return plan.output / "runs" / f"{cell.name}.json"


def _stored(config: TrainConfig) -> dict[str, Any]:
    """Settings that make a run what it is."""
    return {key: value for key, value in asdict(config).items() if key not in GRID[1:]}


def _inputs(cell: Cell, data: TextData) -> str:
    """A hash of the data and the base model of a run."""
    return hashlib.sha256(f"{digest_of(data)} {base_id(cell.config.model)}".encode()).hexdigest()


def _short(result: dict[str, Any]) -> str:
    if result["failure"]:
        return "diverged"
    report = result["report"]
    return (
        f"{report['metric']} {report['value']:.4f} ({result['choice']:.4f} on the choosing rows), "
        f"{report['adapter_parameters']:,} parameters, {report['seconds']:.0f} s"
    )


# ---- reading the plan ---------------------------------------------------------------------------


def _settings(given: Any, where: str, below: dict[str, Any]) -> dict[str, Any]:
    """Settings of one level over those of the levels below."""
    found = settings_of(mapping(given, where) if given is not None else {}, TrainConfig, where)
    for key in GRID:
        if key in found:
            raise SettingError(f"{where}: `{key}` belongs to the comparison, not to a run.")
    return {**below, **found}


def _lrs(given: Any, where: str) -> tuple[dict[str, Any], list[float] | None]:
    """A method's settings without `lr`, and its list of step sizes where it has one."""
    settings = mapping(given, where) if given is not None else {}
    if not isinstance(settings.get("lr"), list):
        return settings, None
    lrs = [of_type(lr, float, f"{where}: `lr`") for lr in settings["lr"]]
    if not lrs:
        raise SettingError(f"{where}: `lr` must have one step size or more.")
    return {key: value for key, value in settings.items() if key != "lr"}, lrs


# ---- what follows -------------------------------------------------------------------------------


def summarise(
    results: list[tuple[Cell, dict[str, Any]]], labels: dict[str, list[Any]], against: str
) -> dict[str, Any]:
    """Rows of the table, curves over step sizes, and rank maps, from the runs.

    Returns:
        {"against", "rows": one per task and method at the chosen step size, "learning_rates": one
        per task, method and step size, "curves": training losses, "maps": ranks}. Spreads are
        standard deviations over seeds; intervals are of a paired bootstrap over evaluation rows and
        seeds, of the difference to `against`.
    """
    by_cell: dict[tuple[str, str], dict[float | None, list[dict[str, Any]]]] = {}
    for cell, result in results:
        runs = by_cell.setdefault((cell.task, cell.method), {})
        runs.setdefault(cell.lr, []).append({**result, "seed": cell.seed})
    sweeps, rows, curves, maps = [], [], [], []
    chosen = {key: _best_lr(runs) for key, runs in by_cell.items()}
    for (task, method), runs in by_cell.items():
        for lr, found in runs.items():
            sweeps.append({"task": task, "method": method, "lr": lr, **_scores(found)})
        best = chosen[task, method]
        row: dict[str, Any] = {"task": task, "method": method, "lr": best}
        rows.append(row)
        whole = [run for run in runs[best] if not run["failure"]]
        row |= _scores(runs[best])
        if not whole:
            continue
        row |= _costs(whole)
        rivals = by_cell[task, against][chosen[task, against]]
        if method != against:
            row["difference"] = _difference(whole, rivals, labels[task])
        first = whole[0]
        curves.append(
            {
                "task": task,
                "method": method,
                "seed": first["seed"],
                "steps": [entry["step"] for entry in first["history"]],
                "losses": [entry["loss"] for entry in first["history"]],
                "regularised": first["settings"]["method"] == "adalora",
            }
        )
        maps.append({"task": task, "method": method, "ranks": first["report"]["ranks"]})
    metrics = {
        task: run["report"]["metric"]
        for (task, _), runs in by_cell.items()
        for found in runs.values()
        for run in found
        if not run["failure"]
    }
    return {
        "against": against,
        "metrics": metrics,
        "rows": rows,
        "learning_rates": sweeps,
        "curves": curves,
        "maps": maps,
    }


def _best_lr(runs: dict[float | None, list[dict[str, Any]]]) -> float | None:
    """The step size with the best mean score on the choosing rows; the smaller one of equals.

    One at which any seed diverged is taken only where all have.
    """

    def worth(lr: float | None) -> tuple[bool, float, float]:
        whole = [run["choice"] for run in runs[lr] if not run["failure"]]
        mean = statistics.fmean(whole) if whole else -math.inf
        return len(whole) == len(runs[lr]), mean, -(lr or 0.0)

    return max(runs, key=worth)


def _scores(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of the scores; None where every run diverged."""
    whole = [run for run in runs if not run["failure"]]
    values = [run["report"]["value"] for run in whole]
    return {
        "seeds": len(runs),
        "diverged": len(runs) - len(whole),
        "value": _mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "choice": _mean([run["choice"] for run in whole]),
        "train_loss": _mean([run["report"]["train_loss"] for run in whole]),
    }


def _costs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    reports = [run["report"] for run in runs]
    return {
        "adapter_parameters": round(statistics.fmean(r["adapter_parameters"] for r in reports)),
        "exported_parameters": round(statistics.fmean(r["exported_parameters"] for r in reports)),
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in reports),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in reports),
    }


def _difference(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], labels: list[Any]
) -> dict[str, Any] | None:
    """Mean difference of two methods and its bootstrap interval; seeds are paired.

    Rows of the evaluation set and seeds are both drawn again with replacement, the same draw for
    both methods. None where they have no seed in common.
    """
    other = {run["seed"]: run for run in theirs if not run["failure"]}
    pairs = [(run, other[run["seed"]]) for run in ours if run["seed"] in other]
    if not pairs:
        return None
    metric = METRICS[pairs[0][0]["report"]["metric"]]
    target, rows = torch.tensor(labels), len(labels)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(RESAMPLES // 1000):  # in parts: a part holds 1000 x rows numbers
        index = torch.randint(rows, (1000, rows), generator=generator)
        weights = torch.zeros(1000, rows, dtype=torch.float64)
        weights.scatter_add_(1, index, torch.ones_like(weights))
        gaps = [
            metric(torch.tensor(a["predictions"]), target, weights)
            - metric(torch.tensor(b["predictions"]), target, weights)
            for a, b in pairs
        ]
        seeds = torch.randint(len(pairs), (1000, len(pairs)), generator=generator)
        draws.append(torch.stack(gaps, dim=1).gather(1, seeds).mean(1))
    low, high = torch.cat(draws).quantile(
        torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64)
    )
    mean = statistics.fmean(a["report"]["value"] - b["report"]["value"] for a, b in pairs)
    return {"mean": mean, "low": float(low), "high": float(high), "seeds": len(pairs)}


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
