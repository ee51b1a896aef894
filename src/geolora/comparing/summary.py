"""What follows from the runs of a comparison: the chosen step sizes, the table, curves and maps.

All numbers are computed here, the intervals in `bootstrap.py`; `report/comparison.py` draws them.
"""

import json
import math
import statistics
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geolora.comparing.bootstrap import Difference, interval, paired_difference
from geolora.comparing.plan import GRID, Cell
from geolora.methods import METHODS
from geolora.tasks.metrics import LOWER_IS_BETTER

FILES = ("model", "train", "eval")
"""Settings that may be paths; of an absolute one only the name is kept."""


def summarise(
    results: list[tuple[Cell, dict[str, Any]]], against: str, choose_on: float | None = None
) -> dict[str, Any]:
    """Rows of the table, curves over step sizes, and rank maps, from the runs.

    Args:
        choose_on: share of the training rows that chose the step sizes, where it is known.

    Returns:
        {"against", "rows": one per task and method at the chosen step size, "means": one per method
        that has a score on all of several tasks, where more is better on all or less on all, "learning_rates": one per task, method and step
        size, "curves": training losses, "maps": ranks, "budgets": maps of budget and step size,
        "failures": the runs that diverged, and what the runs were: "metrics", "lower_is_better",
        "seeds", "choose_on", "settings", "versions"}. Spreads are standard deviations over seeds;
        intervals are of a paired bootstrap over evaluation rows and seeds, of the difference to
        `against`.
    """
    by_cell: dict[tuple[str, str], dict[float | None, list[dict[str, Any]]]] = {}
    for cell, result in results:
        runs = by_cell.setdefault((cell.task, cell.method), {})
        runs.setdefault(cell.lr, []).append({**result, "seed": cell.seed})
    chosen = {key: _best_lr(runs) for key, runs in by_cell.items()}
    sweeps, rows, curves, maps = [], [], [], []
    differences: dict[str, dict[str, Difference]] = {}
    for (task, method), runs in by_cell.items():
        key, best = {"task": task, "method": method}, chosen[task, method]
        sweeps += [{**key, "lr": lr, **_scores(at_lr)} for lr, at_lr in runs.items()]
        row: dict[str, Any] = {**key, "lr": best, **_scores(runs[best])}
        rows.append(row)
        finished = _finished(runs[best])
        if not finished:
            continue
        row |= _costs(finished)
        if method != against:
            rivals = by_cell[task, against][chosen[task, against]]
            difference = paired_difference(finished, _finished(rivals), zlib.crc32(task.encode()))
            row["difference"] = difference and interval([difference])
            if difference:
                differences.setdefault(method, {})[task] = difference
        curves.append({**key, **_curve(finished[0])})
        maps.append({**key, "ranks": finished[0]["report"]["ranks"]})
    metrics = {
        task: run["report"]["metric"]
        for (task, _), runs in by_cell.items()
        for at_lr in runs.values()
        for run in _finished(at_lr)
    }
    return {
        "against": against,
        "choose_on": choose_on,
        "seeds": sorted({cell.seed for cell, _ in results}),
        "metrics": metrics,
        "lower_is_better": [task for task, name in metrics.items() if name in LOWER_IS_BETTER],
        "rows": rows,
        "means": _means(rows, differences) if _same_direction(metrics) else [],
        "learning_rates": sweeps,
        "curves": curves,
        "maps": maps,
        "budgets": _budgets(results, sweeps),
        "failures": _failures(results),
        "settings": _settings(results),
        "versions": _versions(results),
    }


def _finished(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that did not diverge."""
    return [run for run in runs if not run["failure"]]


def _best_lr(runs: dict[float | None, list[dict[str, Any]]]) -> float | None:
    """The step size with the best mean score on the choosing rows; the smaller one of equals.

    A run whose `choice` is None takes no part: it was made for the step size that had been chosen.
    One at which any seed diverged is taken only where all have.
    """

    def worth(lr: float | None) -> tuple[bool, float, float]:
        finished = _finished(runs[lr])
        scores = [_worth(run) for run in finished if run["choice"] is not None]
        mean = statistics.fmean(scores) if scores else -math.inf
        return len(finished) == len(runs[lr]), mean, -(lr or 0.0)

    return max(runs, key=worth)


def _worth(run: dict[str, Any]) -> float:
    """The score on the choosing rows, the larger the better."""
    return -run["choice"] if run["report"]["metric"] in LOWER_IS_BETTER else run["choice"]


def _scores(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of the scores; None where every run diverged."""
    finished = _finished(runs)
    values = [run["report"]["value"] for run in finished]
    return {
        "seeds": len(runs),
        "diverged": len(runs) - len(finished),
        "value": _mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "choice": _mean([run["choice"] for run in finished if run["choice"] is not None]),
        "train_loss": _mean([run["report"]["train_loss"] for run in finished]),
    }


def _costs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    reports = [run["report"] for run in runs]
    return {
        "adapter_parameters": round(statistics.fmean(r["adapter_parameters"] for r in reports)),
        "exported_parameters": round(statistics.fmean(r["exported_parameters"] for r in reports)),
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in reports),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in reports),
    }


def _curve(run: dict[str, Any]) -> dict[str, Any]:
    """Losses of a run over its steps; `regularised` where they hold a penalty that others have not."""
    method = METHODS.get(run["settings"]["method"])
    return {
        "seed": run["seed"],
        "steps": [entry["step"] for entry in run["history"]],
        "losses": [entry["loss"] for entry in run["history"]],
        "regularised": method is not None and method.regularises,
    }


def _same_direction(metrics: dict[str, str]) -> bool:
    return len({name in LOWER_IS_BETTER for name in metrics.values()}) < 2


def _means(
    rows: list[dict[str, Any]], differences: dict[str, dict[str, Difference]]
) -> list[dict[str, Any]]:
    """Means over the tasks, of the methods that have a score on each; none for a single task."""
    tasks = {row["task"] for row in rows}
    means = []
    for method in dict.fromkeys(row["method"] for row in rows) if len(tasks) > 1 else ():
        mine = [row for row in rows if row["method"] == method and row["value"] is not None]
        if len(mine) < len(tasks):
            continue
        mean: dict[str, Any] = {
            "method": method,
            "value": _mean([row["value"] for row in mine]),
            "adapter_parameters": round(_mean([row["adapter_parameters"] for row in mine]) or 0),
            "exported_parameters": round(_mean([row["exported_parameters"] for row in mine]) or 0),
        }
        if len(differences.get(method, {})) == len(tasks):
            mean["difference"] = interval(list(differences[method].values()))
        means.append(mean)
    return means


# ---- what the runs were -------------------------------------------------------------------------


def _budgets(
    results: list[tuple[Cell, dict[str, Any]]], sweeps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Maps of budget and step size: methods that differ by `budget` alone, over several of both."""
    alike: dict[tuple[str, str, str], dict[str, int]] = {}
    for cell, _ in results:
        settings = _shown(cell)
        budget = settings.pop("budget")
        if budget is not None:
            key = (cell.task, cell.config.method, json.dumps(settings))
            alike.setdefault(key, {})[cell.method] = budget
    maps = []
    for (task, method, _), budgets in alike.items():
        fields = [
            {"budget": budgets[row["method"]], **{key: row[key] for key in FIELD}}
            for row in sweeps
            if row["task"] == task and row["method"] in budgets and row["lr"] is not None
        ]
        sizes, lrs = ({field[key] for field in fields} for key in ("budget", "lr"))
        if len(sizes) > 1 and len(lrs) > 1:
            axes = {"budgets": sorted(sizes), "lrs": sorted(lrs)}
            maps.append({"task": task, "method": method, **axes, "fields": fields})
    return maps


FIELD = ("method", "lr", "seeds", "diverged", "value")
"""What a field of such a map has beside its budget."""


def _settings(results: list[tuple[Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Settings of the runs, each as far out as it goes: of all, of a task, of a method, or of both.

    Returns:
        One entry per scope, {"task": None for all, "method": None for all, "values"}; `lr` is the
        list of what was tried.
    """
    lrs: dict[tuple[str, str], list[float | None]] = {}
    for cell, _ in results:
        tried = lrs.setdefault((cell.task, cell.method), [])
        if cell.lr not in tried:
            tried.append(cell.lr)
    cells = {
        (cell.task, cell.method): {**_shown(cell), "lr": lrs[cell.task, cell.method]}
        for cell, _ in results
    }
    scopes: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    for name in next(iter(cells.values())):
        for of_task, of_method in ((False, False), (True, False), (False, True), (True, True)):
            in_scope: dict[tuple[str | None, str | None], list[Any]] = {}
            for (task, method), values in cells.items():
                scope = (task if of_task else None, method if of_method else None)
                in_scope.setdefault(scope, []).append(values[name])
            if all(value == same[0] for same in in_scope.values() for value in same):
                for scope, same in in_scope.items():
                    if same[0] is not None:
                        scopes.setdefault(scope, {})[name] = same[0]
                break
    ordered = sorted(scopes.items(), key=lambda item: [name is not None for name in item[0]])
    return [{"task": task, "method": method, "values": v} for (task, method), v in ordered]


def _shown(cell: Cell) -> dict[str, Any]:
    """Settings of a run without what the grid gives and without folders of the machine."""
    settings = {k: v for k, v in asdict(cell.config).items() if k not in (*GRID, "lr")}
    for key in FILES:
        if Path(settings[key]).is_absolute():
            settings[key] = Path(settings[key]).name
    return settings


def _failures(results: list[tuple[Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The runs that diverged, and what they said."""
    return [
        {
            "task": cell.task,
            "method": cell.method,
            "lr": cell.lr,
            "seed": cell.seed,
            "text": result["failure"],
        }
        for cell, result in results
        if result["failure"]
    ]


def _versions(results: list[tuple[Cell, dict[str, Any]]]) -> dict[str, list[str]]:
    """All versions that made a run, by package."""
    by_package: dict[str, set[str]] = {}
    for _, result in results:
        for package, version in result.get("report", {}).get("versions", {}).items():
            by_package.setdefault(package, set()).add(version)
    return {package: sorted(versions) for package, versions in by_package.items()}


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
