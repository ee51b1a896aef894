"""What a comparison's figures show of one task, drawn on axes; no number is computed here."""

from math import isfinite
from typing import Any

from geolora.report.figures import draw_cells

DIVERGED = "diverged"


def tasks(summary: dict[str, Any]) -> list[str]:
    """Names of the tasks, in the order of the table."""
    return list(dict.fromkeys(row["task"] for row in summary["rows"]))


def metric(summary: dict[str, Any], task: str) -> str:
    """The name of a task's metric, and whether less of it is better."""
    name = summary["metrics"].get(task, "score")
    return name + " (lower is better)" * (task in summary.get("lower_is_better", ()))


def colors(summary: dict[str, Any]) -> dict[str, Any]:
    """A colour per method, the same in every figure; no two alike up to twenty methods."""
    from matplotlib import colormaps

    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    palette: Any = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    return {method: palette.colors[i % palette.N] for i, method in enumerate(methods)}


def against_parameters(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Score and spread of every method over its parameters, settled and in the file."""
    shown = colors(summary)
    for row in summary["rows"]:
        if row["task"] != task or row["value"] is None:
            continue
        color, value = shown[row["method"]], row["value"]
        axes.errorbar(
            row["adapter_parameters"],
            value,
            yerr=row["spread"],
            fmt="o",
            capsize=3,
            color=color,
            label=row["method"],
        )
        axes.plot(
            row["exported_parameters"],
            value,
            marker="o",
            fillstyle="none",
            linestyle="none",
            color=color,
        )
    axes.set_xlabel("adapter parameters (open: numbers in the file)")
    axes.set_ylabel(metric(summary, task))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.4g}k")


def learning_rates(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Score of every method over the step sizes that were tried."""
    chosen = {row["method"]: row["lr"] for row in summary["rows"] if row["task"] == task}
    marks = "ring: chosen on held-back training rows"
    for index, (method, color) in enumerate(colors(summary).items()):
        tried = [
            row
            for row in summary["learning_rates"]
            if (row["task"], row["method"]) == (task, method) and row["lr"] is not None
        ]
        tried.sort(key=lambda row: row["lr"])
        if lost := [row["lr"] for row in tried if row["diverged"]]:
            marks = "ring: chosen on held-back rows; x: a run diverged"
            height = 0.03 + 0.04 * (index % 20)  # of the panel: none hides another
            axes.plot(
                lost, [height] * len(lost), "x", color=color, transform=axes.get_xaxis_transform()
            )
        points = [row for row in tried if row["value"] is not None]
        if not points:
            continue
        axes.errorbar(
            [row["lr"] for row in points],
            [row["value"] for row in points],
            yerr=[row["spread"] or 0.0 for row in points],
            marker="o",
            markersize=4,
            capsize=3,
            color=color,
            label=method,
        )
        for row in points:
            if row["lr"] == chosen.get(method):
                axes.plot(row["lr"], row["value"], "o", markersize=9, fillstyle="none", color=color)
    _logarithmic(axes)
    axes.set_xlabel(f"learning rate ({marks})", fontsize="small")
    axes.set_ylabel(metric(summary, task))


def loss_curves(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Training loss of every method at its chosen step size."""
    shown = colors(summary)
    for curve in summary["curves"]:
        if curve["task"] == task:
            axes.plot(
                curve["steps"],
                curve["losses"],
                color=shown.get(curve["method"]),
                label=curve["method"] + (" (with its regulariser)" if curve["regularised"] else ""),
                linewidth=1.2,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")


def budget_map(axes: Any, summary: dict[str, Any], found: dict[str, Any]) -> Any:
    """Score as the colour of every budget and step size; a field where a run diverged is hatched.

    Returns:
        The cells, for a scale of colours; None where every run of the map diverged.
    """
    from matplotlib.patches import Rectangle

    budgets, lrs = found["budgets"][::-1], found["lrs"]
    fields = {(field["budget"], field["lr"]): field for field in found["fields"]}
    table = [[fields[b, lr]["value"] if (b, lr) in fields else None for lr in lrs] for b in budgets]
    values = [value for row in table for value in row if value is not None and isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    less = found["task"] in summary.get("lower_is_better", ())
    cells = draw_cells(axes, table, low, high, "viridis_r" if less else "viridis")
    for y, budget in enumerate(budgets):
        for x, lr in enumerate(lrs):
            if (budget, lr) not in fields:
                continue
            field = fields[budget, lr]
            value, lost, runs = field["value"], field["diverged"], field["seeds"]
            if lost:
                corner = (x - 0.5, y - 0.5)
                axes.add_patch(
                    Rectangle(
                        corner, 1, 1, fill=False, hatch="///", edgecolor="0.55", linewidth=0.5
                    )
                )
            some = DIVERGED if lost == runs else f"{lost} of {runs}\n{DIVERGED}"
            words = "\n".join(
                [*([f"{value:.3f}"] if value is not None else []), *([some] if lost else [])]
            )
            pale = lost or value is None or ((value - low) > 0.6 * (high - low)) != less
            box = {"facecolor": "w", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
            axes.text(
                x,
                y,
                words,
                ha="center",
                va="center",
                fontsize="small",
                color="k" if pale else "w",
                bbox=box if lost else None,
            )
    axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    axes.set_yticks(range(len(budgets)), [f"{budget:,}" for budget in budgets])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("budget (parameters)")
    return cells if values else None


def budget_size(found: dict[str, Any]) -> tuple[float, float]:
    """Width and height, in inches, of such a map without its scale."""
    return 1.3 + 0.8 * len(found["lrs"]), 0.9 + 0.6 * len(found["budgets"])


def _logarithmic(axes: Any) -> None:
    """A logarithmic x-axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
