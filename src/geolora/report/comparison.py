"""Table and figures of a comparison, drawn from its comparison.json; no number is computed here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from geolora.errors import escaped
from geolora.report import panels
from geolora.report.clean import read_clean
from geolora.report.figures import can_draw, save
from geolora.report.inline import plain_names
from geolora.report.layout import rank_table
from geolora.report.text import as_text
from geolora.report.view import metric_name, results_for_a_terminal, task_names


def table(summary: dict[str, Any]) -> str:
    """The rows of a comparison as text: one per task and method, at the chosen step size."""
    metrics = ", ".join(f"{task}: {metric_name(summary, task)}" for task in summary["metrics"])
    return "\n".join(
        [
            *as_text(results_for_a_terminal(summary)),
            "",
            escaped(
                f"Score: {metrics}; mean and spread (standard deviation) over seeds. Difference to "
                f"{summary['against']}."
            ),
            "lr of every method chosen on training rows that were held back, never on the scored ones.",
        ]
    )


def figures(folder: str | Path) -> list[Path]:
    """Draw the figures of a comparison into its folder.

    Returns:
        Their paths; none where matplotlib is not installed.
    """
    if not can_draw():
        return []
    folder = Path(folder)
    summary = read_clean(folder / "comparison.json")
    with plain_names():
        drawn = {
            "score_against_parameters.png": _task_by_task(summary, panels.against_parameters),
            "learning_rates.png": _task_by_task(summary, panels.learning_rates),
            "loss_curves.png": _task_by_task(summary, panels.loss_curves),
            "rank_maps.png": _rank_maps(summary),
        }
        if summary.get("budgets"):
            drawn["budgets.png"] = _budget_maps(summary)
        paths = []
        for name, figure in drawn.items():
            save(figure, folder / name)
            paths.append(folder / name)
    return paths


def _task_by_task(summary: dict[str, Any], draw: Callable[[Any, dict[str, Any], str], None]) -> Any:
    """A figure with one panel per task, and one legend."""
    from matplotlib.figure import Figure

    tasks = task_names(summary)
    figure = Figure(figsize=(1.0 + 4.4 * len(tasks), 3.6), layout="constrained")
    entries: dict[str, Any] = {}
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        draw(axes, summary, task)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=max(1, min(5, len(entries))),
    )
    return figure


def _budget_maps(summary: dict[str, Any]) -> Any:
    """A panel per map of budget and step size."""
    from matplotlib.figure import Figure

    maps = summary["budgets"]
    sizes = [panels.budget_size(entry) for entry in maps]
    size = (sum(width + 1.3 for width, _ in sizes), 0.4 + max(height for _, height in sizes))
    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, len(maps), squeeze=False, width_ratios=[w for w, _ in sizes])[0]
    for entry, axes in zip(maps, row, strict=True):
        panels.budget_map(axes, summary, entry)
    return figure


def _rank_maps(summary: dict[str, Any]) -> Any:
    """Ranks by kind of module and depth: a row of panels per task, a panel per method."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry["task"] for entry in summary["maps"]))
    methods = list(dict.fromkeys(entry["method"] for entry in summary["maps"]))
    maps = {(entry["task"], entry["method"]): entry["ranks"] for entry in summary["maps"]}
    if not maps:
        return Figure()
    tables = [rank_table(ranks) for ranks in maps.values()]
    kinds = max(panels.ticks(kinds) for kinds, _, _ in tables)
    depths = max(panels.ticks(depths) for _, depths, _ in tables)
    names = 0.08 * max(len(kind) for kinds, _, _ in tables for kind in kinds)
    size = (
        1.4 + names + len(methods) * (0.3 + 0.4 * depths),
        0.4 + len(tasks) * (0.9 + 0.36 * kinds),
    )
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), len(methods), squeeze=False)
    top = max(1, *(rank for ranks in maps.values() for rank in ranks.values()))
    cells: Any = None
    for y, task in enumerate(tasks):
        for x, method in enumerate(methods):
            axes = grid[y][x]
            if (task, method) not in maps:
                axes.set_axis_off()
                continue
            cells = panels.rank_map(axes, maps[task, method], top, f"{task}: {method}")
            if x > 0:
                axes.set_yticklabels([])
    figure.colorbar(cells, ax=grid, label="rank", shrink=0.8)
    return figure
