"""report.html of a comparison or a run: one file that needs no other, drawn from their JSON alone."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from geolora.files import read_json
from geolora.report import panels
from geolora.report.blocks import (
    Markup,
    legend,
    number,
    page,
    section,
    table,
    tag,
    without_folders,
)
from geolora.report.figures import can_draw, map_figure
from geolora.report.inline import inline, plain_names

NAME = "report.html"
NO_FIGURES = (
    "Figures are missing: they need matplotlib. Run pip install 'geolora[plots]', then "
    "geolora plot with this page's folder."
)
WIDE = 5.0
"""Inches from which on a figure scrolls and is not made to fit its column."""
NOT_SETTINGS = ("data", "output", "overwrite")
"""Entries of run.json that say nothing about the result."""


def write_comparison(folder: str | Path) -> Path:
    """Write the page of the comparison in a folder, from its comparison.json."""
    folder = Path(folder)
    summary = read_json(folder / "comparison.json")
    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    tasks = panels.tasks(summary)
    title = f"{_count(methods, 'method')} on {_count(tasks, 'task')}, compared by geolora"
    content = [_what(summary, tasks, methods), section("Results", *_results(summary))]
    if can_draw():
        with plain_names():
            content += _figures(summary)
    else:
        content.append(tag("p", NO_FIGURES, class_="note"))
    if failures := summary.get("failures"):
        rows = [[f["task"], f["method"], _lr(f["lr"]), str(f["seed"]), f["text"]] for f in failures]
        head = ["task", "method", "learning rate", "seed", "why"]
        content.append(section("Runs that diverged", table(head, [rows], class_="words")))
    scopes = [
        (
            ", ".join(name for name in (scope["task"], scope["method"]) if name is not None)
            or "all runs",
            scope["values"],
        )
        for scope in summary.get("settings", ())
    ]
    content.append(_settings(scopes))
    content.append(_versions(summary.get("versions", {})))
    return _write(folder, page(title, *content))


def write_run(folder: str | Path, lower_is_better: bool = False) -> Path:
    """Write the page of the run in a folder, from report.json, history.json and run.json.

    Args:
        lower_is_better: whether less of the run's metric is better.
    """
    folder = Path(folder)
    report = read_json(folder / "report.json")
    history = read_json(folder / "history.json") if (folder / "history.json").exists() else []
    settings = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    metric = report["metric"] + " (lower is better)" * lower_is_better
    title = f"{report['method']} on {report['task']}: {report['metric']} {report['value']:.4f}"
    ranks = list(report["ranks"].values())
    facts = [
        (metric, f"{report['value']:.4f}"),
        ("training loss, mean of the last tenth", f"{report['train_loss']:.4f}"),
        ("adapter parameters", f"{report['adapter_parameters']:,}"),
        ("numbers in the adapter file", f"{report['exported_parameters']:,}"),
        ("trainable parameters", f"{report['trainable_parameters']:,}"),
        ("ranks", f"{min(ranks)} to {max(ranks)} in {_count(ranks, 'layer')}"),
        ("steps", f"{report['steps']:,}"),
        ("seconds per step", f"{report['seconds_per_step']:.3f}"),
        ("seconds in all", f"{report['seconds']:,.0f}"),
        ("peak memory", f"{report['peak_memory_bytes'] / 1e6:,.0f} MB"),
        ("seed", str(report["seed"])),
    ]
    rows = [[tag("th", name, scope="row"), number(value)] for name, value in facts]
    content = [tag("p", "One training run of geolora."), section("Result", table([], [rows]))]
    if can_draw():
        with plain_names():
            content.append(section("Training loss", *_history(history)))
            drawn = map_figure(report["ranks"], max([1, *ranks]))
            content.append(
                section("Ranks of the layers", inline(drawn, "rank of every layer by depth"))
            )
    else:
        content.append(tag("p", NO_FIGURES, class_="note"))
    given = {k: v for k, v in settings.items() if k not in NOT_SETTINGS and v is not None}
    if given:
        shown = [[tag("td", tag("code", key)), _setting(value)] for key, value in given.items()]
        content.append(section("Settings", table(["setting", "value"], [shown])))
    content.append(_versions({k: [v] for k, v in report["versions"].items()}))
    content.append(section("Command", tag("pre", without_folders(report["command"]))))
    return _write(folder, page(title, *content))


# ---- a comparison -------------------------------------------------------------------------------


def _what(summary: dict[str, Any], tasks: list[str], methods: list[str]) -> Markup:
    """What was compared, and how the step sizes were chosen."""
    measured = "; ".join(f"{task}, {panels.metric(summary, task)}" for task in tasks)
    lines = [f"Methods: {', '.join(methods)}.", f"Tasks and their scores: {measured}."]
    if "seeds" in summary:
        lines.append(f"Seeds: {', '.join(map(str, summary['seeds']))}.")
    share = summary.get("choose_on")
    rows = f"{100 * share:g} % of the training rows" if share else "training rows"
    lines.append(
        f"Where a method was given several learning rates, the one with the best mean score on {rows}, "
        "held back from training, was taken; never on the rows that are scored."
    )
    return Markup("\n".join(tag("p", line) for line in lines))


def _results(summary: dict[str, Any]) -> list[Markup]:
    against = summary["against"]
    head: list[Any] = [
        tag("th", name, class_="number") if wide else tag("th", name)
        for name, wide in (
            ("task", False),
            ("method", False),
            ("learning rate", True),
            ("score ± spread", True),
            ("runs", True),
            (f"difference to {against} [95\u00a0%]", True),
            ("parameters", True),
            ("in the file", True),
            ("s/step", True),
            ("peak MB", True),
        )
    ]
    bodies = [
        _group(
            task, panels.metric(summary, task), [r for r in summary["rows"] if r["task"] == task]
        )
        for task in panels.tasks(summary)
    ]
    if summary.get("means"):
        kinds = dict.fromkeys(panels.metric(summary, task) for task in summary["metrics"])
        bodies.append(_group("mean over tasks", ", ".join(kinds), summary["means"]))
    note = (
        "Score: mean and spread (standard deviation) over the runs, one run a seed. Difference: its "
        "mean and the interval of a paired bootstrap over evaluation rows and seeds. Parameters: of "
        "the adapter, settled; the file may hold more numbers."
    )
    return [table(head, bodies), tag("p", note, class_="note")]


def _group(name: str, metric: str, rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of the table under one name, which stands before the first."""
    label = Markup(f"{tag('b', name)}<br>{tag('span', metric, class_='note')}")
    first = tag("th", label, rowspan=str(len(rows)), scope="rowgroup")
    return [[*([first] if i == 0 else []), *_cells(row)] for i, row in enumerate(rows)]


def _cells(row: dict[str, Any]) -> list[Markup]:
    value, spread, gap = row["value"], row.get("spread"), row.get("difference")
    score = "none" if value is None else f"{value:.4f}"
    runs: Any = str(row["seeds"]) if "seeds" in row else ""
    if lost := row.get("diverged"):
        runs = Markup(f"{tag('span', f'{lost} of {runs} diverged', class_='bad')}")
    memory = row.get("peak_memory_bytes")
    return [
        tag("td", row["method"], class_="name"),
        number(_lr(row["lr"]) if "lr" in row else ""),
        number(score + (f" ± {spread:.4f}" if spread is not None else "")),
        number(runs),
        number(f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else ""),
        number(f"{row['adapter_parameters']:,}" if "adapter_parameters" in row else ""),
        number(f"{row['exported_parameters']:,}" if "exported_parameters" in row else ""),
        number(f"{row['seconds_per_step']:.3f}" if memory else ""),
        number(f"{memory / 1e6:,.0f}" if memory else ""),
    ]


def _figures(summary: dict[str, Any]) -> list[Markup]:
    found = [_per_task(summary, "Score against parameters", panels.against_parameters)]
    if any(row["lr"] is not None for row in summary["learning_rates"]):
        untried = {r["method"]: None for r in summary["learning_rates"] if r["lr"] is None}
        note = f"At the default learning rate, and so not shown: {', '.join(untried)}."
        notes = [tag("p", note, class_="note")] if untried else []
        title = "Robustness to the learning rate"
        found.append(_per_task(summary, title, panels.learning_rates, *notes))
    if maps := summary.get("budgets"):
        drawn = []
        for index, one in enumerate(maps, 1):
            figure = _empty(*panels.budget_size(one), bar=1.3)
            axes = figure.subplots()
            axes.set_title(f"{one['task']}: {one['method']}", fontsize="medium")
            cells = panels.budget_map(axes, summary, one)
            if cells is not None:
                figure.colorbar(cells, label=panels.metric(summary, one["task"]))
            label = f"budget and learning rate {index}, {one['task']}: {one['method']}"
            drawn.append(inline(figure, label))
        note = "Colour: score. Hatched: a run diverged. White: not run."
        found.append(
            section(
                "Budget and learning rate",
                tag("div", *drawn, class_="row"),
                tag("p", note, class_="note"),
            )
        )
    found.append(_per_task(summary, "Training loss", panels.loss_curves))
    found.append(section("Ranks of the layers", *_maps(summary)))
    return found


def _per_task(
    summary: dict[str, Any],
    title: str,
    draw: Callable[[Any, dict[str, Any], str], None],
    *notes: Markup,
) -> Markup:
    """A figure per task, which flow side by side, under one legend."""
    drawn, entries = [], {}
    for task in panels.tasks(summary):
        figure = _empty(4.4, 3.4)
        axes = figure.subplots()
        axes.set_title(task, fontsize="medium")
        axes.grid(alpha=0.25)
        draw(axes, summary, task)
        drawn.append(inline(figure, f"{title}, {task}"))
        entries |= _colors(axes)
    return section(title, legend(entries), tag("div", *drawn, class_="figures"), *notes)


def _maps(summary: dict[str, Any]) -> Iterable[Markup]:
    """The rank maps, a line of them per task, with one scale of colours."""
    maps = summary["maps"]
    top = max([1, *(rank for entry in maps for rank in entry["ranks"].values())])
    for task in dict.fromkeys(entry["task"] for entry in maps):
        drawn, width = [], 0.0
        for entry in (entry for entry in maps if entry["task"] == task):
            figure = map_figure(entry["ranks"], top, small=True)
            figure.axes[0].set_title(entry["method"], fontsize="medium")
            drawn.append(inline(figure, f"ranks, {task}: {entry['method']}"))
            width = max(width, figure.get_figwidth())
        yield tag("h3", task)
        yield tag("div", *drawn, class_="figures" if width < WIDE else "row")


# ---- parts of both ------------------------------------------------------------------------------


def _history(history: list[dict[str, Any]]) -> list[Markup]:
    """The training loss of a run over its steps."""
    if not history:
        return []
    figure = _empty(5.6, 3.4)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    return [inline(figure, "training loss over the steps")]


def _empty(width: float, height: float, bar: float = 0.0) -> Any:
    """A figure without axes, of a size in inches; `bar`: what a scale of colours takes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width + bar, height), layout="constrained")


def _colors(axes: Any) -> dict[str, str]:
    """{label: colour} of what is drawn."""
    from matplotlib.colors import to_hex

    found = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle if hasattr(handle, "get_color") else handle.lines[0]
        found[label] = to_hex(line.get_color())
    return found


def _settings(scopes: list[tuple[str, dict[str, Any]]]) -> Markup:
    """Settings of a comparison by what they are of."""
    bodies = []
    for name, values in scopes:
        first = tag("th", name, rowspan=str(len(values)), scope="rowgroup")
        bodies.append(
            [
                [*([first] if i == 0 else []), tag("td", tag("code", key)), _setting(value)]
                for i, (key, value) in enumerate(values.items())
            ]
        )
    head = ["of", "setting", "value"]
    return section("Settings", table(head, bodies)) if bodies else Markup()


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_lr(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return without_folders(f"{value:g}" if isinstance(value, float) else str(value))


def _versions(versions: dict[str, list[str]]) -> Markup:
    rows = [[name, ", ".join(found)] for name, found in versions.items()]
    return section("Versions", table(["package", "version"], [rows])) if rows else Markup()


def _lr(value: Any) -> str:
    return "default" if value is None else f"{value:g}"


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _write(folder: Path, text: str) -> Path:
    """Write the page so that a reader sees the whole file or none."""
    path = folder / NAME
    partial = path.with_name(f"{NAME}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)
    return path
