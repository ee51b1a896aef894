"""Tables as text, and an inspected adapter: a rank map, and a row with a small spectrum for every layer."""

import math
from typing import Any

from geolora.errors import escaped
from geolora.report.layout import rank_table
from geolora.report.view import Column, Group, Table

WIDEST = 120
"""Characters of a line of the rank map; deeper models go on below."""

BLOCKS = "▁▂▃▄▅▆▇█"
MOST = 32
"""Singular values in a small spectrum; an ellipsis stands for the rest."""


def as_text(table: Table) -> list[str]:
    """The lines of a table; numbers are aligned to the right. Names of groups are left out."""
    titles = [column.title for column in table.columns]
    lines = [[escaped(cell) for cell in row] for row in (titles, *table.rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    numbers = [column.style == "number" for column in table.columns]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]


def rank_map(ranks: dict[str, int], title: str) -> str:
    """A grid of ranks, kinds of module by depth, under a title."""
    kinds, depths, table = rank_table(ranks)
    kinds = [escaped(kind) for kind in kinds]
    name = max(map(len, kinds))
    cell = 1 + max(len(str(entry)) for entry in (*ranks.values(), *depths))
    room = max(1, (WIDEST - name - 2) // cell)
    lines = [title]
    for start in range(0, len(depths), room):
        shown = slice(start, start + room)
        lines.append(f"  {'':{name}}" + "".join(f"{depth:>{cell}}" for depth in depths[shown]))
        for kind, row in zip(kinds, table, strict=True):
            entries = ("" if rank is None else rank for rank in row[shown])
            lines.append(f"  {kind:{name}}" + "".join(f"{entry:>{cell}}" for entry in entries))
    return "\n".join(line.rstrip() for line in lines)


def layer_rows(rows: list[dict[str, Any]], judged: str, spectra: bool = True) -> str:
    """A line per layer: shape, rank, what is needed and what that drops, singular values.

    Args:
        rows: of `geolora.inspect`, as dicts.
        judged: heading of the needed rank.
        spectra: whether small spectra of block characters are shown.
    """
    columns = [
        Column("layer"),
        Column("shape", "number"),
        Column("rank", "number"),
        Column(judged, "number"),
        Column("dropped", "number"),
        Column("leading singular values"),
        Column("spectrum" if spectra else ""),
    ]
    cells = [
        [
            row["layer"],
            f"{row['d_out']} x {row['d_in']}",
            str(row["rank"]),
            str(row["settled_rank"]),
            f"{row['share_dropped']:.3f}",
            " ".join(f"{value:.3g}" for value in row["sigma"][:4]) or "-",
            spectrum(row["sigma"], row["settled_rank"]) if spectra else "",
        ]
        for row in rows
    ]
    lines = as_text(Table(columns, [Group(cells)]))
    if spectra:
        lines.append("spectrum: one step down is a factor of 2, | is the cut")
    return "\n".join(lines)


def spectrum(sigma: list[float], kept: int) -> str:
    """Block characters for singular values, eight levels of a factor of 2, and | at the cut."""
    if not sigma:
        return "-"
    levels = [max(0, 7 + math.ceil(math.log2(value / sigma[0]))) for value in sigma[:MOST]]
    bars = [BLOCKS[level] for level in levels]
    if len(sigma) > MOST:
        bars.append("…")
    if kept < min(len(sigma), MOST):
        bars.insert(kept, "|")
    return "".join(bars)
