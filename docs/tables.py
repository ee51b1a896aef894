"""Fills tables into the pages: of methods, from the table in the code; of models, from what a test found (a hook of mkdocs).

A page holds `<!-- table: NAME -->` where the table NAME of TABLES is to stand.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from geolora.methods import METHODS, Method

NO_CLASS = "transformers has no "
MARK = re.compile(r"<!-- table: (\w+) -->")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its tables."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """Markdown with every mark replaced by its table."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def papers() -> str:
    """Methods whose mathematics is ours."""
    return _table(
        ("paper", "what is done", "file", "in Python", "on the command line"),
        [
            (
                f"{row.title}, {_arxiv(row)}",
                row.summary,
                f"`{row.mathematics.partition(':')[0].rpartition('.')[2]}.py`",
                ", ".join(f"`{name}`" for name in row.public),
                f"`--init {row.name}`" if row.kind == "start" else f"`--method {row.name}`",
            )
            for row in METHODS.values()
            if row.mathematics
        ],
    )


def notes() -> str:
    """Their defaults, and what differs from the paper."""
    return _table(
        ("method", "defaults", "what differs from the paper or its authors' code"),
        [(row.title, row.defaults, row.notes) for row in METHODS.values() if row.mathematics],
    )


def peft() -> str:
    """PEFT's methods."""
    return _table(
        ("`--method`", "what is done", "paper", "what `geolora train` adds"),
        [
            (f"`{row.name}`", row.summary, _arxiv(row), row.notes)
            for row in METHODS.values()
            if not row.mathematics
        ],
    )


def optimizers() -> str:
    """Entries of the API for the optimizers beside GeoLoRA."""
    rows = [row for row in METHODS.values() if row.kind == "optimizer" and row.public]
    return "\n\n".join(f"::: geolora.{row.public[0]}" for row in rows if row.name != "geolora")


def models() -> str:
    """What works with what."""
    found = json.loads((Path(__file__).parent / "what_works.json").read_text(encoding="utf-8"))
    tasks = list(dict.fromkeys(task for row in found.values() for task in row))

    def sign(told: str | None) -> str:
        known = {None: "", "works": "yes"}
        return known.get(told) or (
            "" if told is None else "no class" if NO_CLASS in told else "refused"
        )

    return _table(
        ("architecture", *tasks),
        [(name, *(sign(row.get(task)) for task in tasks)) for name, row in found.items()],
    )


TABLES: dict[str, Callable[[], str]] = {
    "papers": papers,
    "notes": notes,
    "peft": peft,
    "optimizers": optimizers,
    "models": models,
}


def _arxiv(row: Method) -> str:
    return f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
