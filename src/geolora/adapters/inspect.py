"""Rank and singular values of every layer of a saved LoRA adapter, of any program; no base model is needed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geolora.adapters.read import read_adapter
from geolora.errors import SettingError
from geolora.kernels.truncate import rank_by_tail, settled_ranks
from geolora.pairs.find import check_budget
from geolora.pairs.point import read_pair


@dataclass(frozen=True)
class LayerReport:
    """A row of `inspect`.

    Attributes:
        layer: name in the base model.
        d_out, d_in: shape of W; a kernel is flattened into d_in.
        rank: directions in use, the numerical rank of W = s B A.
        sigma: singular values of W, descending, as many as `rank`.
        tail_rank: rank needed for the tail.
        share_of_tail: ||what that would drop|| / ||sigma||.
        settled_rank: rank needed for the tail and within the budget over all layers, what
            `geolora.prune` leaves; `tail_rank` without a budget.
        share_dropped: ||what that would drop|| / ||sigma||.
    """

    layer: str
    d_out: int
    d_in: int
    rank: int
    sigma: list[float]
    tail_rank: int
    share_of_tail: float
    settled_rank: int
    share_dropped: float


def inspect(path: str | Path, tail: float = 0.25, budget: int | None = None) -> list[LayerReport]:
    """Rank and singular values of every layer of a saved LoRA adapter, geolora's or not.

    Args:
        path: a PEFT adapter folder; the base model is not needed.
        tail: fraction of ||sigma||_2 a layer may lose, in [0, 1).
        budget: adapter parameters to keep at most, sum of rank * (d_in + d_out); None for any.

    Returns:
        One row per layer, by name and number.

    Raises:
        SettingError: tail outside [0, 1). BudgetError: less than one direction per layer.
        AdapterError: no LoRA adapter that can be read in the folder.
    """
    if not 0 <= tail < 1:
        raise SettingError(f"inspect: `tail` must be in [0, 1); got {tail}.")
    pairs = read_adapter(path).pairs
    costs = [pair.cost for pair in pairs]
    check_budget(costs, budget, "inspect: `budget`", " Raise it.")
    sigmas = [read_pair(pair.A, pair.B, pair.scale).sigma for pair in pairs]
    sigmas = [sigma[sigma > 0] for sigma in sigmas]
    settled = settled_ranks(sigmas, costs, tail, budget)
    rows = []
    for pair, sigma, kept in zip(pairs, sigmas, settled, strict=True):
        by_tail, kept = int(rank_by_tail(sigma, tail)), min(kept, len(sigma))
        rows.append(
            LayerReport(
                pair.name,
                pair.d_out,
                pair.d_in,
                len(sigma),
                sigma.tolist(),
                by_tail,
                _share_after(sigma, by_tail),
                kept,
                _share_after(sigma, kept),
            )
        )
    return rows


def _share_after(sigma: Tensor, rank: int) -> float:
    """||sigma beyond a rank|| / ||sigma||; 0 for nothing at all."""
    size = float(torch.linalg.vector_norm(sigma))
    return float(torch.linalg.vector_norm(sigma[rank:])) / size if size else 0.0


def as_rows(reports: list[LayerReport]) -> list[dict[str, Any]]:
    """Plain dicts of `inspect`'s rows, for JSON, text and figures."""
    return [asdict(report) for report in reports]
