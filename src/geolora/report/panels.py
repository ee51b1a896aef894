"""Every panel of a figure, drawn on the axes it is given: in a PNG and on a page it is the same panel.

No number is computed here.
"""

from math import isfinite
from typing import Any

from geolora.report.layout import rank_table
from geolora.report.view import method_names, metric_name

DIVERGED = "diverged"
MOST_TICKS, MOST_NUMBERS = 128, 4_000
"""Names at a side of a rank map, and ranks that it says in numbers: matplotlib takes seconds for a thousand."""

# ---- one task of a comparison -------------------------------------------------------------------


def against_parameters(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Score and spread of every method over its parameters, settled and in the file."""
    _begin(axes, task)
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
    axes.set_ylabel(metric_name(summary, task))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.4g}k")


def learning_rates(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Score of every method over the step sizes that were tried."""
    _begin(axes, task)
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
    axes.set_ylabel(metric_name(summary, task))


def loss_curves(axes: Any, summary: dict[str, Any], task: str) -> None:
    """Training loss of every method at its chosen step size."""
    _begin(axes, task)
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


def colors(summary: dict[str, Any]) -> dict[str, Any]:
    """A colour per method, the same in every figure; no two alike up to twenty methods."""
    from matplotlib import colormaps

    methods = method_names(summary)
    palette: Any = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    return {method: palette.colors[i % palette.N] for i, method in enumerate(methods)}


def label_colors(axes: Any) -> dict[str, str]:
    """{label: colour} of what is drawn on axes, for a legend."""
    from matplotlib.colors import to_hex

    labels = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle if hasattr(handle, "get_color") else handle.lines[0]
        labels[label] = to_hex(line.get_color())
    return labels


def _begin(axes: Any, task: str) -> None:
    axes.set_title(task, fontsize="medium")
    axes.grid(alpha=0.25)


def _logarithmic(axes: Any) -> None:
    """A logarithmic x-axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


# ---- one run ------------------------------------------------------------------------------------


def run_loss(axes: Any, history: list[dict[str, Any]]) -> None:
    """The training loss of a run over its steps."""
    axes.grid(alpha=0.25)
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")


def search(axes: Any, found: dict[str, Any], key: str) -> None:
    """A number of every probe of a search for a step size, and what it is held to.

    Args:
        found: a step_size.json. key: "lr", "trust" or "length" of its probes; values that are none are left out.
    """
    from matplotlib.ticker import MaxNLocator

    label, bound, bound_label = {
        "lr": ("step size", found["lr"], "found"),
        "trust": ("actual / predicted fall of the loss", found["bounds"]["trust"], "at least"),
        "length": ("length of the step", found["bounds"]["length"], "at most"),
    }[key]
    known = [(i, p[key]) for i, p in enumerate(found["curve"], 1) if p[key] is not None]
    least = -1.0 if key == "trust" else 0.0  # of a step that was far too long any number may come
    axes.grid(alpha=0.25)
    axes.plot([i for i, _ in known], [max(least, value) for _, value in known], marker=".")
    axes.axhline(bound, linestyle="--", color="k", label=f"{bound_label} {bound:.2g}")
    if key == "lr":
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("probe")
    axes.set_ylabel(label)
    axes.legend(frameon=False)


# ---- coloured maps ------------------------------------------------------------------------------


def rank_map(
    axes: Any, ranks: dict[str, int], top: int, title: str, letters: str | None = None
) -> Any:
    """The ranks of layers, by kind of module and depth, as coloured cells with their numbers.

    Args:
        top: the rank at the end of the scale of colours.
        letters: their size, matplotlib's default if not given.

    Returns:
        The cells, for a scale of colours.
    """
    axes.set_title(title, fontsize="medium")
    kinds, depths, table = rank_table(ranks)
    cells = _coloured_cells(
        axes, [[None if value is None else float(value) for value in row] for row in table], 0, top
    )
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None and len(ranks) <= MOST_NUMBERS:
                color = "w" if value < 0.6 * top else "k"
                axes.text(x, y, str(value), ha="center", va="center", color=color, size=letters)
    for place, names in ((axes.set_xticks, depths), (axes.set_yticks, kinds)):
        step = -(-len(names) // MOST_TICKS)
        place(range(0, len(names), step), names[::step], size=letters)
    axes.set_xlabel("layer", size=letters)
    return cells


def ticks(names: list[str]) -> int:
    """For how many of these a rank map has room."""
    return min(len(names), MOST_TICKS)


def budget_map(axes: Any, summary: dict[str, Any], entry: dict[str, Any]) -> None:
    """Score as the colour of every budget and step size; a field where a run diverged is hatched.

    Beside it stands the scale of colours, unless every run of the map diverged.

    Args:
        entry: one of the comparison's `budgets`.
    """
    axes.set_title(f"{entry['task']}: {entry['method']}", fontsize="medium")
    budgets, lrs = entry["budgets"][::-1], entry["lrs"]
    fields = {(field["budget"], field["lr"]): field for field in entry["fields"]}
    scores = [
        [fields[b, lr]["value"] if (b, lr) in fields else None for lr in lrs] for b in budgets
    ]
    values = [value for row in scores for value in row if value is not None and isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    less = entry["task"] in summary.get("lower_is_better", ())
    cells = _coloured_cells(axes, scores, low, high, "viridis_r" if less else "viridis")
    for y, budget in enumerate(budgets):
        for x, lr in enumerate(lrs):
            if (budget, lr) not in fields:
                continue
            field = fields[budget, lr]
            value = field["value"]
            bright = value is None or ((value - low) > 0.6 * (high - low)) != less
            _write_score(axes, (x, y), field, "k" if bright else "w")
    axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    axes.set_yticks(range(len(budgets)), [f"{budget:,}" for budget in budgets])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("budget (parameters)")
    if values:
        axes.figure.colorbar(cells, ax=axes, label=metric_name(summary, entry["task"]))


def _write_score(axes: Any, centre: tuple[int, int], field: dict[str, Any], color: str) -> None:
    """Score of a budget and step size in its cell, and how many of its runs diverged, hatched."""
    from matplotlib.patches import Rectangle

    x, y = centre
    lost, runs = field["diverged"], field["seeds"]
    words = [] if field["value"] is None else [f"{field['value']:.3f}"]
    box = None
    if lost:
        words.append(DIVERGED if lost == runs else f"{lost} of {runs}\n{DIVERGED}")
        box = {"facecolor": "w", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        hatch = {"fill": False, "hatch": "///", "edgecolor": "0.55", "linewidth": 0.5}
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **hatch))
    axes.text(
        x,
        y,
        "\n".join(words),
        ha="center",
        va="center",
        fontsize="small",
        color="k" if lost else color,
        bbox=box,
    )


def budget_size(entry: dict[str, Any]) -> tuple[float, float]:
    """Width and height, in inches, of such a map without its scale of colours."""
    return 1.3 + 0.8 * len(entry["lrs"]), 0.9 + 0.6 * len(entry["budgets"])


def _coloured_cells(
    axes: Any, table: list[list[float | None]], low: float, high: float, cmap: str = "viridis"
) -> Any:
    """Coloured cells, the first row on top, centred on whole numbers; None stays white."""
    cells = axes.pcolormesh(
        [x - 0.5 for x in range(len(table[0]) + 1)],
        [y - 0.5 for y in range(len(table) + 1)],
        [[float("nan") if value is None else value for value in row] for row in table],
        vmin=low,
        vmax=high,
        cmap=cmap,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.set_ylim(len(table) - 0.5, -0.5)
    return cells
