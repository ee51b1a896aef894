"""Table and figures of a comparison, drawn from its comparison.json; no number is computed here."""

import json
from pathlib import Path
from typing import Any

from geolora.report.figures import can_draw, draw_map
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
    metrics = ", ".join(f"{task}: {name}" for task, name in summary["metrics"].items())
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
    summary = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    drawn = {
        "score_against_parameters.png": _against_parameters(summary),
        "learning_rates.png": _learning_rates(summary),
        "loss_curves.png": _loss_curves(summary),
        "rank_maps.png": _rank_maps(summary),
    }
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


def _panels(summary: dict[str, Any], height: float = 3.6) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel per task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in summary["rows"]))
    figure = Figure(figsize=(1.0 + 4.4 * len(tasks), height), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for task, panel in zip(tasks, axes, strict=True):
        panel.set_title(task, fontsize="medium")
        panel.grid(alpha=0.25)
    return figure, dict(zip(tasks, axes, strict=True))


def _colors(summary: dict[str, Any]) -> dict[str, Any]:
    """A colour per method, the same in every figure; no two alike up to twenty methods."""
    from matplotlib import colormaps

    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    palette: Any = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    return {method: palette.colors[i % palette.N] for i, method in enumerate(methods)}


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(5, len(labels))))


def _against_parameters(summary: dict[str, Any]) -> Any:
    figure, panels = _panels(summary)
    colors = _colors(summary)
    for row in summary["rows"]:
        if row["value"] is None:
            continue
        panel = panels[row["task"]]
        panel.errorbar(
            row["adapter_parameters"],
            row["value"],
            yerr=row["spread"],
            fmt="o",
            capsize=3,
            color=colors[row["method"]],
            label=row["method"],
        )
        panel.plot(
            row["exported_parameters"],
            row["value"],
            marker="o",
            fillstyle="none",
            linestyle="none",
            color=colors[row["method"]],
        )
    for task, panel in panels.items():
        panel.set_xlabel("adapter parameters (open: numbers in the file)")
        panel.set_ylabel(summary["metrics"].get(task, "score"))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
    _legend(figure, next(iter(panels.values())))
    return figure


def _learning_rates(summary: dict[str, Any]) -> Any:
    figure, panels = _panels(summary)
    colors = _colors(summary)
    chosen = {(row["task"], row["method"]): row["lr"] for row in summary["rows"]}
    for task, panel in panels.items():
        for method, color in colors.items():
            points = sorted(
                (
                    (row["lr"], row)
                    for row in summary["learning_rates"]
                    if (row["task"], row["method"]) == (task, method)
                    and row["lr"] is not None
                    and row["value"] is not None
                ),
                key=lambda point: point[0],
            )
            if not points:
                continue
            panel.errorbar(
                [lr for lr, _ in points],
                [row["value"] for _, row in points],
                yerr=[row["spread"] or 0.0 for _, row in points],
                marker="o",
                markersize=4,
                capsize=3,
                color=color,
                label=method,
            )
            for lr, row in points:
                if lr == chosen[task, method]:
                    panel.plot(lr, row["value"], "o", markersize=9, fillstyle="none", color=color)
        panel.set_xscale("log")
        panel.set_xlabel("learning rate (ring: chosen on held-back training rows)")
        panel.set_ylabel(summary["metrics"].get(task, "score"))
    _legend(figure, next(iter(panels.values())))
    return figure


def _loss_curves(summary: dict[str, Any]) -> Any:
    figure, panels = _panels(summary)
    colors = _colors(summary)
    for curve in summary["curves"]:
        panels[curve["task"]].plot(
            curve["steps"],
            curve["losses"],
            color=colors[curve["method"]],
            label=curve["method"] + (" (with its regulariser)" if curve["regularised"] else ""),
            linewidth=1.2,
        )
    for panel in panels.values():
        panel.set_xlabel("step")
        panel.set_ylabel("training loss")
    _legend(figure, next(iter(panels.values())))
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
