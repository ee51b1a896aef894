"""Layers laid out by kind of module and depth, for text and figures."""

import re
from collections.abc import Iterable
from typing import Any

MOST_CELLS = 100_000
"""Cells of a grid; layers that would need more stand one below the other."""


def kinds_and_depths(layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{layer: (kind, depth)}.

    The depth of a layer is the first number in its name, its kind what stands behind it; a layer
    without a number has depth "-". Several stacks (encoder, decoder) are kept apart.
    """
    layers = list(layers)
    stacks = {match[1] for name in layers if (match := re.match(r"(.*?)\.?(\d+)\.", name))}
    result = {}
    for name in layers:
        match = re.match(r"(.*?)\.?(\d+)\.(.+)$", name)
        stack, depth, kind = match.groups() if match else ("", "-", name)
        if len(stacks) > 1 and stack:
            kind = f"{stack}: {kind}"
        result[name] = (kind, depth)
    kinds, depths = ({place[i] for place in result.values()} for i in (0, 1))
    if len(kinds) * len(depths) > max(MOST_CELLS, 10 * len(result)):
        return {name: (name, "-") for name in layers}
    return result


def depth_order(depths: Iterable[str]) -> list[str]:
    """Each depth once, ascending, with "-" at the end."""
    return sorted(set(depths), key=lambda depth: (depth == "-", 0 if depth == "-" else int(depth)))


def rank_table(ranks: dict[str, int]) -> tuple[list[str], list[str], list[list[int | None]]]:
    """Ranks laid out as kinds of module (rows) by depth (columns); None where there is no layer."""
    positions = kinds_and_depths(ranks)
    cells = {positions[name]: rank for name, rank in ranks.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    depths = depth_order(depth for _, depth in cells)
    table: list[list[Any]] = [[cells.get((kind, depth)) for depth in depths] for kind in kinds]
    return kinds, depths, table
