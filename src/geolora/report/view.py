"""What is shown of a comparison or a run, in words: tables of display strings, for a terminal and for a page.

Here a number gets its digits and a setting its words; `text` sets these tables as text, the templates as
HTML. No number is computed here.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from geolora.report.clean import without_folders

NOT_SETTINGS = ("data", "output", "overwrite")
"""Entries of run.json that say nothing about the result."""


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        style: "number" (aligned to the right), "name" (not broken), "code", "heading", or "" for words.
    """

    title: str
    style: str = ""


class Bad(str):
    """A cell that says that something went wrong; a page sets it in red."""


class Group(NamedTuple):
    """Rows of a table, a display string per cell; a named group has its name before its first row."""

    rows: list[list[str]]
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table as it is shown.

    Attributes:
        names: title of the column in which the names of the groups stand, if they have names.
    """

    columns: list[Column]
    groups: list[Group]
    names: str = ""

    @property
    def has_titles(self) -> bool:
        """Whether a row of titles stands above."""
        return any(column.title for column in self.columns)

    @property
    def rows(self) -> list[list[str]]:
        """The rows of all groups."""
        return [row for group in self.groups for row in group.rows]


# ---- a comparison -------------------------------------------------------------------------------


def task_names(summary: dict[str, Any]) -> list[str]:
    """The tasks of a comparison, in the order of its table."""
    return list(dict.fromkeys(row["task"] for row in summary["rows"]))


def method_names(summary: dict[str, Any]) -> list[str]:
    """The methods of a comparison, in the order of its table."""
    return list(dict.fromkeys(row["method"] for row in summary["rows"]))


def metric_name(summary: dict[str, Any], task: str) -> str:
    """The name of a task's metric, and whether less of it is better."""
    return _metric(
        summary["metrics"].get(task, "score"), task in summary.get("lower_is_better", ())
    )


class _Result(NamedTuple):
    """A row of a comparison as it is shown; "" where there is nothing to show."""

    method: str
    lr: str
    score: str
    spread: str
    runs: str
    diverged: str
    difference: str
    costs: list[str]


COSTS = [
    Column("parameters", "number"),
    Column("in the file", "number"),
    Column("s/step", "number"),
    Column("peak MB", "number"),
]
"""Columns of `_Result.costs`."""


def _result(row: dict[str, Any]) -> _Result:
    value, spread, gap = row["value"], row.get("spread"), row.get("difference")
    memory = row.get("peak_memory_bytes")
    return _Result(
        method=row["method"],
        lr=step_size(row["lr"]) if "lr" in row else "",
        score="none" if value is None else f"{value:.4f}",
        spread="" if spread is None else f"{spread:.4f}",
        runs=str(row["seeds"]) if "seeds" in row else "",
        diverged=f"{row['diverged']} of {row['seeds']} diverged" if row.get("diverged") else "",
        difference=f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap else "",
        costs=[
            f"{row['adapter_parameters']:,}" if "adapter_parameters" in row else "",
            f"{row['exported_parameters']:,}" if "exported_parameters" in row else "",
            f"{row['seconds_per_step']:.3f}" if memory else "",
            f"{memory / 1e6:,.0f}" if memory else "",
        ],
    )


def results_for_a_terminal(summary: dict[str, Any]) -> Table:
    """A row per task and method, at the chosen step size; then the means over tasks."""
    columns = [
        Column("task"),
        Column("method"),
        Column("lr", "number"),
        Column("score", "number"),
        Column("spread", "number"),
        Column("difference [95 %]", "number"),
        *COSTS,
    ]
    rows = []
    for row in (*summary["rows"], *summary.get("means", ())):
        shown = _result(row)
        score = shown.score + (f" ({shown.diverged})" if shown.diverged else "")
        task = row.get("task", "mean")
        rows.append(
            [task, shown.method, shown.lr, score, shown.spread, shown.difference, *shown.costs]
        )
    return Table(columns, [Group(rows)])


def results_for_a_page(summary: dict[str, Any]) -> Table:
    """The same rows, grouped by task, with what is compared with in the title of the difference."""
    columns = [
        Column("method", "name"),
        Column("learning rate", "number"),
        Column("score ± spread", "number"),
        Column("runs", "number"),
        Column(f"difference to {summary['against']} [95\u00a0%]", "number"),
        *COSTS,
    ]
    groups = [
        Group(
            [_row_of_a_page(row) for row in summary["rows"] if row["task"] == task],
            task,
            metric_name(summary, task),
        )
        for task in task_names(summary)
    ]
    if means := summary.get("means"):
        metrics = dict.fromkeys(metric_name(summary, task) for task in summary["metrics"])
        rows = [_row_of_a_page(row) for row in means]
        groups.append(Group(rows, "mean over tasks", ", ".join(metrics)))
    return Table(columns, groups, names="task")


def _row_of_a_page(row: dict[str, Any]) -> list[str]:
    shown = _result(row)
    score = shown.score + (f" ± {shown.spread}" if shown.spread else "")
    runs = Bad(shown.diverged) if shown.diverged else shown.runs
    return [shown.method, shown.lr, score, runs, shown.difference, *shown.costs]


def failures(summary: dict[str, Any]) -> Table:
    """The runs of a comparison that diverged, and why."""
    columns = [Column(name) for name in ("task", "method", "learning rate", "seed", "why")]
    rows = [
        [run["task"], run["method"], step_size(run["lr"]), str(run["seed"]), run["text"]]
        for run in summary.get("failures", ())
    ]
    return Table(columns, [Group(rows)])


def settings_by_scope(summary: dict[str, Any]) -> Table:
    """The settings of a comparison, grouped by the runs they hold for."""
    groups = [
        Group(
            [[key, setting(value)] for key, value in scope["values"].items()],
            ", ".join(name for name in (scope["task"], scope["method"]) if name is not None)
            or "all runs",
        )
        for scope in summary.get("settings", ())
    ]
    return Table([Column("setting", "code"), Column("value")], groups, names="of")


# ---- a run --------------------------------------------------------------------------------------


def run_facts(report: dict[str, Any], lower_is_better: bool) -> Table:
    """What came out of a run, a line per number."""
    ranks = list(report["ranks"].values())
    facts = [
        [_metric(report["metric"], lower_is_better), f"{report['value']:.4f}"],
        ["training loss, mean of the last tenth", f"{report['train_loss']:.4f}"],
        ["adapter parameters", f"{report['adapter_parameters']:,}"],
        ["numbers in the adapter file", f"{report['exported_parameters']:,}"],
        ["trainable parameters", f"{report['trainable_parameters']:,}"],
        ["ranks", f"{min(ranks)} to {max(ranks)} in {counted(ranks, 'layer')}"],
        *([["step size", f"{report['lr']:.3g}"]] if "lr" in report else []),
        ["steps", f"{report['steps']:,}"],
        ["seconds per step", f"{report['seconds_per_step']:.3f}"],
        ["seconds in all", f"{report['seconds']:,.0f}"],
        ["peak memory", f"{report['peak_memory_bytes'] / 1e6:,.0f} MB"],
        ["seed", str(report["seed"])],
    ]
    return Table([Column("", "heading"), Column("", "number")], [Group(facts)])


def run_settings(settings: dict[str, Any]) -> Table:
    """The settings of a run that were given."""
    given = {k: v for k, v in settings.items() if k not in NOT_SETTINGS and v is not None}
    rows = [[key, setting(value)] for key, value in given.items()]
    return Table([Column("setting", "code"), Column("value")], [Group(rows)])


# ---- both ---------------------------------------------------------------------------------------


def versions(packages: dict[str, list[str]]) -> Table:
    """The versions of the packages that were used."""
    rows = [[package, ", ".join(used)] for package, used in packages.items()]
    return Table([Column("package"), Column("version")], [Group(rows)])


def setting(value: Any) -> str:
    """The value of a setting, without folders of the machine."""
    if isinstance(value, list):
        return ", ".join("default" if entry is None else setting(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return without_folders(f"{value:g}" if isinstance(value, float) else str(value))


def step_size(lr: float | None) -> str:
    """A learning rate; None is the method's own."""
    return "default" if lr is None else f"{lr:g}"


def counted(things: list[Any], name: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _metric(name: str, lower_is_better: bool) -> str:
    return name + " (lower is better)" * lower_is_better
