"""Table and figures of a comparison, drawn from its comparison.json; no number is computed here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from geolora.files import read_json
from geolora.report import panels
from geolora.report.figures import can_draw, draw_map
from geolora.report.inline import plain_names
from geolora.report.layout import rank_table

COLUMNS = (
    "task", "method", "lr", "score", "spread", "difference [95 %]", "parameters", "in the file",
    "s/step", "peak MB",
)  # fmt: skip


def table(summary: dict[str, Any]) -> str:
    """The rows of a comparison as text: one per task and method, at the chosen step size."""
    lines = [COLUMNS, *(_cells(row) for row in (*summary["rows"], *summary["means"]))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    metrics = ", ".join(f"{task}: {panels.metric(summary, task)}" for task in summary["metrics"])
    return "\n".join(
        [
            *text,
            "",
            f"Score: {metrics}; mean and spread (standard deviation) over seeds. Difference to "
            f"{summary['against']}.",
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
    summary = read_json(folder / "comparison.json")
    with plain_names():
        drawn = {
            "score_against_parameters.png": _panels(summary, panels.against_parameters),
            "learning_rates.png": _panels(summary, panels.learning_rates),
            "loss_curves.png": _panels(summary, panels.loss_curves),
            "rank_maps.png": _rank_maps(summary),
        }
        if summary.get("budgets"):
            drawn["budgets.png"] = _budgets(summary)
        paths = []
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=150)
            paths.append(folder / name)
    return paths


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    gap = row.get("difference")
    shown = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else ""
    count = f" ({row['diverged']} of {row['seeds']} diverged)" if row.get("diverged") else ""
    lr = "" if "lr" not in row else "default" if row["lr"] is None else f"{row['lr']:g}"
    memory = row.get("peak_memory_bytes")
    return (
        row.get("task", "mean"),
        row["method"],
        lr,
        (f"{row['value']:.4f}" if row["value"] is not None else "none") + count,
        f"{row['spread']:.4f}" if row.get("spread") is not None else "",
        shown,
        f"{row['adapter_parameters']:,}" if "adapter_parameters" in row else "",
        f"{row['exported_parameters']:,}" if "exported_parameters" in row else "",
        f"{row['seconds_per_step']:.3f}" if memory else "",
        f"{memory / 1e6:,.0f}" if memory else "",
    )


def _panels(summary: dict[str, Any], draw: Callable[[Any, dict[str, Any], str], None]) -> Any:
    """A figure with one panel per task, and one legend."""
    from matplotlib.figure import Figure

    tasks = panels.tasks(summary)
    figure = Figure(figsize=(1.0 + 4.4 * len(tasks), 3.6), layout="constrained")
    entries: dict[str, Any] = {}
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        axes.set_title(task, fontsize="medium")
        axes.grid(alpha=0.25)
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


def _budgets(summary: dict[str, Any]) -> Any:
    """A panel per map of budget and step size."""
    from matplotlib.figure import Figure

    found = summary["budgets"]
    sizes = [panels.budget_size(one) for one in found]
    size = (sum(width + 1.3 for width, _ in sizes), 0.4 + max(height for _, height in sizes))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(found), squeeze=False, width_ratios=[w for w, _ in sizes])[0]
    for one, axes in zip(found, grid, strict=True):
        axes.set_title(f"{one['task']}: {one['method']}", fontsize="medium")
        cells = panels.budget_map(axes, summary, one)
        if cells is not None:
            figure.colorbar(cells, ax=axes, label=panels.metric(summary, one["task"]))
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
    kinds = max(len(kinds) for kinds, _, _ in tables)
    depths = max(len(depths) for _, depths, _ in tables)
    names = 0.08 * max(len(kind) for kinds, _, _ in tables for kind in kinds)
    size = (
        1.4 + names + len(methods) * (0.3 + 0.4 * depths),
        0.4 + len(tasks) * (0.9 + 0.36 * kinds),
    )
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), len(methods), squeeze=False)
    top = max(1, *(rank for ranks in maps.values() for rank in ranks.values()))
    image: Any = None
    for y, task in enumerate(tasks):
        for x, method in enumerate(methods):
            panel = grid[y][x]
            if (task, method) not in maps:
                panel.set_axis_off()
                continue
            image = draw_map(panel, maps[task, method], top)
            panel.set_title(f"{task}: {method}", fontsize="medium")
            if x > 0:
                panel.set_yticklabels([])
    figure.colorbar(image, ax=grid, label="rank", shrink=0.8)
    return figure
