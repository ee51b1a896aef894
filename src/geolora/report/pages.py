"""report.html of a comparison or a run: one file that needs no other, drawn from their JSON alone.

What it says stands in `templates/`, the words of its tables come from `view`, its figures from `panels`.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from geolora.errors import install
from geolora.files.writing import write_text
from geolora.report import panels, view
from geolora.report.clean import clean, read_clean, without_folders
from geolora.report.figures import can_draw, ranks_figure, search_figure
from geolora.report.inline import inline, plain_names

NAME = "report.html"
WIDE = 5.0
"""Inches from which on a figure scrolls and is not made to fit its column."""


class Row(NamedTuple):
    """Figures side by side.

    Attributes:
        style: "figures" where each fills a column, "row" where each keeps its width.
        name: the heading above them, or "".
    """

    figures: list[Markup]
    style: str = "figures"
    name: str = ""


class Section(NamedTuple):
    """Figures under a title.

    Attributes:
        legend: {name: colour}, or None where there is none.
        note: what stands below, or "".
    """

    title: str
    rows: list[Row]
    legend: dict[str, str] | None = None
    note: str = ""


def write_comparison(folder: str | Path) -> Path:
    """Write the page of the comparison in a folder, from its comparison.json."""
    folder = Path(folder)
    summary = read_clean(folder / "comparison.json")
    methods, tasks = view.method_names(summary), view.task_names(summary)
    return _write(
        folder,
        "comparison.html",
        title=f"{view.counted(methods, 'method')} on {view.counted(tasks, 'task')}, compared by geolora",
        methods=methods,
        metrics={task: view.metric_name(summary, task) for task in tasks},
        seeds=summary.get("seeds"),
        held_back=summary.get("choose_on"),
        results=view.results_for_a_page(summary),
        sections=_comparison_figures(summary) if can_draw() else None,
        failures=view.failures(summary),
        settings=view.settings_by_scope(summary),
        versions=view.versions(summary.get("versions", {})),
    )


def write_run(folder: str | Path, lower_is_better: bool = False) -> Path:
    """Write the page of the run in a folder, from report.json, history.json, step_size.json and run.json.

    Args:
        lower_is_better: whether less of the run's metric is better.
    """
    folder = Path(folder)
    report = read_clean(folder / "report.json")
    history = read_clean(folder / "history.json") if (folder / "history.json").exists() else []
    file = folder / "step_size.json"
    search = read_clean(file) if file.exists() else None
    settings = read_clean(folder / "run.json") if (folder / "run.json").exists() else {}
    return _write(
        folder,
        "run.html",
        title=f"{report['method']} on {report['task']}: {report['metric']} {report['value']:.4f}",
        facts=view.run_facts(report, lower_is_better),
        sections=_run_figures(report, history, search) if can_draw() else None,
        settings=view.run_settings(settings),
        versions=view.versions({name: [used] for name, used in report["versions"].items()}),
        command=without_folders(report["command"]),
    )


# ---- the figures of a comparison ----------------------------------------------------------------


def _comparison_figures(summary: dict[str, Any]) -> list[Section]:
    with plain_names():
        sections = [_task_by_task(summary, "Score against parameters", panels.against_parameters)]
        if any(row["lr"] is not None for row in summary["learning_rates"]):
            robust = _task_by_task(
                summary, "Robustness to the learning rate", panels.learning_rates
            )
            if untried := {r["method"]: None for r in summary["learning_rates"] if r["lr"] is None}:
                note = f"At the default learning rate, and so not shown: {', '.join(untried)}."
                robust = robust._replace(note=note)
            sections.append(robust)
        if summary.get("budgets"):
            note = "Colour: score. Hatched: a run diverged. White: not run."
            row = Row(list(_budget_maps(summary)), "row")
            sections.append(Section("Budget and learning rate", [row], note=note))
        sections.append(_task_by_task(summary, "Training loss", panels.loss_curves))
        if summary["maps"]:
            sections.append(Section("Ranks of the layers", list(_rank_maps(summary))))
    return sections


def _task_by_task(
    summary: dict[str, Any], title: str, draw: Callable[[Any, dict[str, Any], str], None]
) -> Section:
    """A figure per task, which flow side by side, under one legend."""
    figures, legend = [], {}
    for task in view.task_names(summary):
        figure, axes = _empty(4.4, 3.4)
        draw(axes, summary, task)
        figures.append(inline(figure, f"{title}, {task}"))
        legend |= panels.label_colors(axes)
    return Section(title, [Row(figures)], legend)


def _budget_maps(summary: dict[str, Any]) -> Iterator[Markup]:
    """A figure per map of budget and step size."""
    for index, entry in enumerate(summary["budgets"], 1):
        width, height = panels.budget_size(entry)
        figure, axes = _empty(width + 1.3, height)
        panels.budget_map(axes, summary, entry)
        label = f"budget and learning rate {index}, {entry['task']}: {entry['method']}"
        yield inline(figure, label)


def _rank_maps(summary: dict[str, Any]) -> Iterator[Row]:
    """The rank maps, a row of them per task, with one scale of colours."""
    maps = summary["maps"]
    top = max([1, *(rank for entry in maps for rank in entry["ranks"].values())])
    for task in dict.fromkeys(entry["task"] for entry in maps):
        figures, width = [], 0.0
        for entry in (entry for entry in maps if entry["task"] == task):
            figure = ranks_figure(entry["ranks"], top, entry["method"], small=True)
            figures.append(inline(figure, f"ranks, {task}: {entry['method']}"))
            width = max(width, figure.get_figwidth())
        yield Row(figures, "figures" if width < WIDE else "row", task)


# ---- the figures of a run -----------------------------------------------------------------------


def _run_figures(
    report: dict[str, Any], history: list[dict[str, Any]], search: dict[str, Any] | None
) -> list[Section]:
    sections = []
    with plain_names():
        if history:
            figure, axes = _empty(5.6, 3.4)
            panels.run_loss(axes, history)
            loss = inline(figure, "training loss over the steps")
            sections.append(Section("Training loss", [Row([loss], "")]))
        if search:
            found = inline(search_figure(search), "the search for the step size")
            sections.append(Section("Step size", [Row([found], "")]))
        figure = ranks_figure(report["ranks"], max([1, *report["ranks"].values()]))
        ranks = inline(figure, "rank of every layer by depth")
        sections.append(Section("Ranks of the layers", [Row([ranks], "")]))
    return sections


def _empty(width: float, height: float) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


# ---- the file -----------------------------------------------------------------------------------


@cache
def _templates() -> Environment:
    """The templates: what they show is cleaned and escaped, and what they lack is an error."""
    environment = Environment(
        loader=PackageLoader("geolora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(str(value)),
    )
    environment.globals["install"] = install
    environment.tests["bad"] = lambda cell: isinstance(cell, view.Bad)
    return environment


def _write(folder: Path, template: str, **shown: Any) -> Path:
    """Write the page so that a reader sees the whole file or none."""
    text = _templates().get_template(template).render(shown)
    path = folder / NAME
    write_text(path, text)
    return path
