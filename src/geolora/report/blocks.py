"""Pieces of a report.html: whatever is not `Markup` is escaped, and nothing is loaded from outside."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
FOLDERS = re.compile(r"(?<![\w.~/:<\\-])(?:~|[A-Za-z]:)?[\\/](?:[^\s\\/]+[\\/])*(?=[^\s\\/])")
"""The folders of an absolute path; relative paths and addresses are left alone."""

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; color: #1b1f24;
  background: #fff; max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #d0d7de; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 48rem; margin: .4rem 0; }
.note { color: #57606a; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e5e8eb; }
thead th, thead th.number { vertical-align: bottom; white-space: normal; border-bottom: 2px solid #8c959f; }
tbody + tbody { border-top: 2px solid #8c959f; }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.name { white-space: nowrap; }
.words td { overflow-wrap: anywhere; min-width: 8rem; }
.bad { color: #a40e26; }
.big { font-size: 1.3rem; }
.figures { display: grid; gap: .5rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.row { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
figure { margin: .3rem 0; overflow-x: auto; max-width: 100%; break-inside: avoid; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
.figures figure > svg, .figures figure > img { width: 100%; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: "DejaVu Sans", Verdana, Arial, sans-serif; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; padding: 0;
  margin: .4rem 0; font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin-right: .4em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
code { font-family: ui-monospace, Consolas, monospace; font-size: .9em; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: .6rem; font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 11px; }
  .scroll, figure { overflow: visible; } }
"""


class Markup(str):
    """HTML that is right as it stands."""


def markup(value: Any) -> str:
    """A value as HTML."""
    return value if isinstance(value, Markup) else Markup(escape(clean(str(value))))


def clean(text: str) -> str:
    """Text without the characters that no page may hold."""
    return NOT_IN_XML.sub("", text)


def without_folders(text: str) -> str:
    """Text in which absolute paths are names: pages are sent to others."""
    return FOLDERS.sub("", text)


def tag(name: str, *content: Any, **attributes: str) -> Markup:
    """An element; `class_` stands for class."""
    given = "".join(f' {key.rstrip("_")}="{markup(value)}"' for key, value in attributes.items())
    end = "" if name == "img" else f"</{name}>"
    return Markup(f"<{name}{given}>{''.join(map(markup, content))}{end}")


def section(title: str, *content: Any) -> Markup:
    """A part of the page under its title; nothing where it has no content."""
    inner = [part for part in content if part]
    return tag("section", tag("h2", title), "\n", *inner, "\n") if inner else Markup()


def number(value: Any) -> Markup:
    """A cell that is aligned as a number."""
    return tag("td", value, class_="number")


def table(
    head: Sequence[Any], bodies: Iterable[Sequence[Sequence[Any]]], class_: str = ""
) -> Markup:
    """A table that scrolls where it is too wide.

    Args:
        head: titles of the columns.
        bodies: groups of rows; a cell that is no td or th becomes a td.
    """

    def cell(value: Any) -> str:
        made = isinstance(value, Markup) and value.startswith(("<td", "<th"))
        return value if made else tag("td", value)

    titles = [title if isinstance(title, Markup) else tag("th", title) for title in head]
    groups = [
        tag("tbody", *(Markup(tag("tr", *map(cell, row)) + "\n") for row in rows))
        for rows in bodies
    ]
    top = [tag("thead", tag("tr", *titles))] if titles else []
    return tag("div", tag("table", *top, *groups, class_=class_), class_="scroll")


def legend(colors: dict[str, str]) -> Markup:
    """Names beside their colours."""
    entries = [
        tag("li", tag("i", style=f"background:{color}"), name) for name, color in colors.items()
    ]
    return tag("ul", *entries, class_="legend")


def page(title: str, *content: Any) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"{tag('title', title)}\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{tag('h1', title)}\n" + "\n".join(map(markup, content)) + "\n</body>\n</html>\n"
    )
