"""Figures of a run, drawn from its report.json. Needs the `plots` extra; without it none is drawn."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def rank_map(folder: str | Path) -> Path | None:
    """Draw `ranks.png` into a run's folder: the rank of every layer by depth and kind.

    Returns:
        The figure, or None where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    folder = Path(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kinds, depths, table = rank_table(report["ranks"])
    width = 2.0 + 0.09 * max(map(len, kinds)) + 0.55 * len(depths)
    figure = Figure(figsize=(width, 1.6 + 0.4 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    top = max(report["ranks"].values())
    image = axes.imshow(
        [[value if value is not None else float("nan") for value in row] for row in table],
        vmin=0,
        vmax=top,
        cmap="viridis",
        aspect="auto",
    )
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None:
                dark = value < 0.6 * top
                axes.text(x, y, str(value), ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(depths)), depths)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(
        f"ranks found by {report['method']}: {report['adapter_parameters']:,} parameters, "
        f"{report['metric']} {report['value']:.3f}",
        fontsize="medium",
    )
    figure.colorbar(image, label="rank")
    path = folder / "ranks.png"
    figure.savefig(path, dpi=150)
    return path


def rank_table(ranks: dict[str, int]) -> tuple[list[str], list[str], list[list[int | None]]]:
    """Ranks laid out as kinds of module (rows) by depth (columns); None where there is no layer.

    The depth of a layer is the first number in its name, its kind what stands behind it; layers
    without a number stand in a last column "-". Several stacks (encoder, decoder) are kept apart.
    """
    cells: dict[tuple[str, str], int] = {}
    stacks = {found[1] for name in ranks if (found := re.match(r"(.*?)\.?(\d+)\.", name))}
    for name, rank in ranks.items():
        found = re.match(r"(.*?)\.?(\d+)\.(.+)$", name)
        stack, depth, kind = found.groups() if found else ("", "-", name)
        if len(stacks) > 1 and stack:
            kind = f"{stack}: {kind}"
        cells[kind, depth] = rank
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    depths = sorted(
        {depth for _, depth in cells}, key=lambda d: (d == "-", int(d) if d != "-" else 0)
    )
    table: list[list[Any]] = [[cells.get((kind, depth)) for depth in depths] for kind in kinds]
    return kinds, depths, table
