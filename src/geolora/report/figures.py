"""Figures of a run, from its report.json, and of an adapter, from the rows of `geolora.inspect`.

They need the `plots` extra.
"""

from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from geolora.files.writing import write_at_once
from geolora.report import panels
from geolora.report.clean import read_clean
from geolora.report.inline import plain_names
from geolora.report.layout import depth_order, kinds_and_depths, rank_table

NAMES = ("ranks.png", "spectra.png")
"""What `adapter_figures` writes."""

MOST_PANELS = 60
"""Kinds of module whose singular values are shown."""
FLOOR = 1e-4
"""Singular values below this part of the largest are not shown."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def rank_map(folder: str | Path, lower_is_better: bool = False) -> Path | None:
    """Draw `ranks.png` into a run's folder: the rank of every layer by depth and kind.

    Args:
        lower_is_better: whether less of the run's metric is better.

    Returns:
        The figure, or None where matplotlib is not installed.
    """
    if not can_draw():
        return None
    folder = Path(folder)
    report = read_clean(folder / "report.json")
    title = (
        f"ranks found by {report['method']}: {report['adapter_parameters']:,} parameters, "
        f"{report['metric']} {report['value']:.3f}" + " (lower is better)" * lower_is_better
    )
    path = folder / "ranks.png"
    with plain_names():
        save(ranks_figure(report["ranks"], max([1, *report["ranks"].values()]), title), path)
    return path


def adapter_figures(rows: list[dict[str, Any]], folder: Path, judged: str) -> list[Path]:
    """Draw `ranks.png` (now and needed) and `spectra.png` of an inspected adapter, or neither where it fails.

    Args:
        rows: of `geolora.inspect`, as dicts.
        folder: where they are written; it exists.
        judged: how the needed rank was found, for the title.
    """
    paths = [folder / name for name in NAMES]
    new = [path for path in paths if not path.exists()]
    try:
        with plain_names():
            for draw, path in zip((_rank_change, _spectra), paths, strict=True):
                save(draw(rows, judged), path)
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    return paths


def search_figure(found: dict[str, Any]) -> Any:
    """A figure of a search for a step size: the step sizes, and the two numbers that bound them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 3), ("lr", "trust", "length"), strict=True):
        panels.search(axes, found, key)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_at_once(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def ranks_figure(ranks: dict[str, int], top: int, title: str = "", small: bool = False) -> Any:
    """A figure of one rank map; a small one has no scale of colours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds, depths, _ = rank_table(ranks)
    letters, across, down = max(map(len, kinds)), panels.ticks(depths), panels.ticks(kinds)
    if small:
        size = (0.4 + 0.075 * letters + 0.34 * across, 0.9 + 0.28 * down)
    else:
        size = (2.0 + 0.09 * letters + 0.55 * across, 1.6 + 0.4 * down)
    figure = Figure(figsize=size, layout="constrained")
    cells = panels.rank_map(figure.subplots(), ranks, top, title, "small" if small else None)
    if not small:
        figure.colorbar(cells, label="rank", ticks=MaxNLocator(integer=True))
    return figure


def _rank_change(rows: list[dict[str, Any]], judged: str) -> Any:
    """Two rank maps: side by side, or one above the other where the model is deep."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    maps = {
        "rank now": {row["layer"]: row["rank"] for row in rows},
        judged.replace(" and ", "\nand "): {row["layer"]: row["settled_rank"] for row in rows},
    }
    kinds, depths, _ = rank_table(maps["rank now"])
    names = 0.09 * max(map(len, kinds))
    across, height = 0.42 * panels.ticks(depths), 0.38 * panels.ticks(kinds)
    beside = len(depths) <= 12
    if beside:
        size = (1.6 + names + 2 * max(across + 0.3, 2.2), 1.3 + height)
    else:
        size = (1.6 + names + across, 2 * (1.0 + height))
    figure = Figure(figsize=size, layout="constrained")
    pair = figure.subplots(1, 2, sharey=True) if beside else figure.subplots(2, 1)
    top = max(1, *maps["rank now"].values())
    cells: Any = None
    for axes, (title, ranks) in zip(pair, maps.items(), strict=True):
        cells = panels.rank_map(axes, ranks, top, title)
    figure.colorbar(cells, ax=pair, label="rank", ticks=MaxNLocator(integer=True))
    return figure


def _spectra(rows: list[dict[str, Any]], judged: str) -> Any:
    """Singular values relative to the largest, a panel per kind of module, a line per layer.

    A line is solid to the cut, which is a dot, and pale beyond.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    positions = kinds_and_depths(row["layer"] for row in rows)
    every = list(dict.fromkeys(kind for kind, _ in positions.values()))
    kinds = every[:MOST_PANELS]
    rows = [row for row in rows if positions[row["layer"]][0] in kinds]
    depths = depth_order(depth for _, depth in positions.values())
    across = min(len(kinds), 4 if len(kinds) in (4, 7, 8) or len(kinds) > 9 else 3)
    down = -(-len(kinds) // across)
    figure = Figure(figsize=(2.0 + 2.9 * across, 1.5 + 2.1 * down), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    axes_of = dict(zip(kinds, grid.flat, strict=False))
    cmap = colormaps["viridis"].resampled(len(depths))
    lowest = 0.1
    for row in rows:
        kind, depth = positions[row["layer"]]
        axes, sigma, kept = axes_of[kind], row["sigma"], row["settled_rank"]
        if not sigma:
            continue
        heights = [value / sigma[0] for value in sigma]
        lowest = min(lowest, heights[-1])
        count = range(1, len(sigma) + 1)
        colour = cmap(depths.index(depth))
        axes.plot(count, heights, color=colour, alpha=0.3, linewidth=1)
        axes.plot(count[:kept], heights[:kept], color=colour, linewidth=1.3)
        axes.plot(kept, heights[kept - 1], "o", color=colour, markersize=4)
    for kind, axes in axes_of.items():
        axes.set_title(_broken(kind), fontsize="small")
        axes.set_yscale("log")
        axes.set_ylim(0.7 * max(lowest, FLOOR), 1.5)
        axes.set_xlim(0.5, max(1, *(len(row["sigma"]) for row in rows)) + 0.5)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for index, axes in enumerate(grid.flat):
        axes.set_visible(index < len(kinds))
        axes.tick_params(labelbottom=index + across >= len(kinds))
    figure.supxlabel("index of the singular value", fontsize="medium")
    figure.supylabel("relative to the largest", fontsize="medium")
    some = f", of the first {len(kinds)} of {len(every)} kinds of module" * (
        len(kinds) < len(every)
    )
    figure.suptitle(f"singular values of the update{some}\ndot: {judged}", fontsize="medium")
    if len(depths) > 1:
        norm = BoundaryNorm([i - 0.5 for i in range(len(depths) + 1)], cmap.N)
        bar = figure.colorbar(ScalarMappable(norm, cmap), ax=grid, label="layer")
        step = -(-len(depths) // 16)
        bar.set_ticks(range(0, len(depths), step), labels=depths[::step])
        bar.minorticks_off()
    return figure


def _broken(kind: str) -> str:
    """A kind of module on lines that fit over a panel, its stack on the first."""
    return "\n".join(line for name in kind.split(": ") for line in wrap(name, 38))
