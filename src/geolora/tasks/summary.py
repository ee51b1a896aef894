"""What follows from the runs of a comparison: the chosen step sizes, the table, curves and maps.

All numbers are computed here; `report/comparison.py` draws them.
"""

import math
import statistics
import zlib
from typing import Any, NamedTuple

import torch

from geolora.tasks.metrics import LOWER_IS_BETTER, METRICS
from geolora.tasks.plan import Cell

RESAMPLES = 10_000
INTERVAL = 0.95


def summarise(results: list[tuple[Cell, dict[str, Any]]], against: str) -> dict[str, Any]:
    """Rows of the table, curves over step sizes, and rank maps, from the runs.

    Returns:
        {"against", "rows": one per task and method at the chosen step size, "means": one per method
        that has a score on all of several tasks, "learning_rates": one per task, method and step
        size, "curves": training losses, "maps": ranks}. Spreads are standard deviations over seeds;
        intervals are of a paired bootstrap over evaluation rows and seeds, of the difference to
        `against`.
    """
    by_cell: dict[tuple[str, str], dict[float | None, list[dict[str, Any]]]] = {}
    for cell, result in results:
        runs = by_cell.setdefault((cell.task, cell.method), {})
        runs.setdefault(cell.lr, []).append({**result, "seed": cell.seed})
    sweeps, rows, curves, maps = [], [], [], []
    chosen = {key: _best_lr(runs) for key, runs in by_cell.items()}
    gaps: dict[str, dict[str, _Gap]] = {}
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
            gap = _gap(whole, rivals, zlib.crc32(task.encode()))
            row["difference"] = gap and _interval([gap])
            if gap:
                gaps.setdefault(method, {})[task] = gap
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
        "means": _means(rows, gaps),
        "learning_rates": sweeps,
        "curves": curves,
        "maps": maps,
    }


def _best_lr(runs: dict[float | None, list[dict[str, Any]]]) -> float | None:
    """The step size with the best mean score on the choosing rows; the smaller one of equals.

    A run whose `choice` is None takes no part: it was made for the step size that had been chosen.
    One at which any seed diverged is taken only where all have.
    """

    def worth(lr: float | None) -> tuple[bool, float, float]:
        whole = [run for run in runs[lr] if not run["failure"]]
        scores = [_worth(run) for run in whole if run["choice"] is not None]
        mean = statistics.fmean(scores) if scores else -math.inf
        return len(whole) == len(runs[lr]), mean, -(lr or 0.0)

    return max(runs, key=worth)


def _worth(run: dict[str, Any]) -> float:
    """The score on the choosing rows, the larger the better."""
    return -run["choice"] if run["report"]["metric"] in LOWER_IS_BETTER else run["choice"]


def _scores(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of the scores; None where every run diverged."""
    whole = [run for run in runs if not run["failure"]]
    values = [run["report"]["value"] for run in whole]
    return {
        "seeds": len(runs),
        "diverged": len(runs) - len(whole),
        "value": _mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "choice": _mean([run["choice"] for run in whole if run["choice"] is not None]),
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


class _Gap(NamedTuple):
    """The difference of two methods on a task: its mean, and the means of all bootstrap draws."""

    mean: float
    draws: torch.Tensor
    seeds: int


def _gap(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], seed: int) -> _Gap | None:
    """The difference of two methods, seeds paired; None where they have no seed in common.

    Rows of the evaluation set and seeds are both drawn again with replacement, the same draw for
    both methods.
    """
    other = {run["seed"]: run for run in theirs if not run["failure"]}
    pairs = [(run, other[run["seed"]]) for run in ours if run["seed"] in other]
    if not pairs:
        return None
    metric = METRICS[pairs[0][0]["report"]["metric"]]
    target = torch.tensor(pairs[0][0]["targets"])
    rows = len(target)
    generator = torch.Generator().manual_seed(seed)
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
    mean = statistics.fmean(a["report"]["value"] - b["report"]["value"] for a, b in pairs)
    return _Gap(mean, torch.cat(draws), len(pairs))


def _interval(gaps: list[_Gap]) -> dict[str, Any]:
    """The mean of one difference or several, its bootstrap interval, and the fewest seeds."""
    low, high = (
        torch.stack([gap.draws for gap in gaps])
        .mean(0)
        .quantile(torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64))
    )
    mean = statistics.fmean(gap.mean for gap in gaps)
    seeds = min(gap.seeds for gap in gaps)
    return {"mean": mean, "low": float(low), "high": float(high), "seeds": seeds}


def _means(rows: list[dict[str, Any]], gaps: dict[str, dict[str, _Gap]]) -> list[dict[str, Any]]:
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
        if len(gaps.get(method, {})) == len(tasks):
            mean["difference"] = _interval(list(gaps[method].values()))
        means.append(mean)
    return means


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None
