"""Rank decisions from singular values, and the cut itself (GeoLoRA, arXiv 2410.18720, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def numerical_rank(sigma: Tensor, tolerance: float) -> Tensor:
    """Number (*batch,) of singular values above `tolerance` times the largest.

    Args:
        sigma: (*batch, k), descending, non-negative.
        tolerance: relative, usually eps of the dtype the factors are kept in.
    """
    return (sigma > tolerance * sigma[..., :1]).sum(-1)


def rank_by_tail(sigma: Tensor, tail: float) -> Tensor:
    """Smallest rank (*batch,) whose discarded singular values have norm <= tail * ||sigma||.

    The rule is relative: ||(sigma_{r+1}, ...)||_2 <= tail ||sigma||_2, so truncation moves W by at
    most that much in the Frobenius norm. tail = 0 drops exact zeros only; all-zero gives rank 0.

    Args:
        sigma: (*batch, k), descending, non-negative.
        tail: fraction of ||sigma||_2 that may be discarded, in [0, 1).
    """
    squares = sigma.double() ** 2
    # rest[i] = what is lost when the rank is i; summed from the small end for accuracy
    rest = squares.flip(-1).cumsum(-1).flip(-1)
    return (rest > tail**2 * rest[..., :1]).sum(-1)


def ranks_in_budget(
    sigmas: Sequence[Tensor], costs: Sequence[int], budget: int, floor: int = 1
) -> list[int]:
    """Ranks of all layers at once whose parameters fit a budget.

    Keeps the directions with the most energy per parameter, sigma^2 / cost, until nothing more
    fits: sum of ranks[i] * costs[i] <= budget. Every layer keeps at least `floor` of the directions
    it has. Ties go to the earlier layer, so every process decides alike.

    Args:
        sigmas: per layer (k_i,), descending, non-negative; zeros are never kept.
        costs: per layer, parameters of one direction, d_in + d_out.
        budget: total number of parameters.

    Raises:
        ValueError: the budget does not hold `floor` directions in every layer.

    Source: global truncation of GeoLoRA (one pool over all layers), with the cost of a direction
    taken into account; the authors count directions, whatever their size, with floor 2.
    """
    counts = [int((sigma > 0).sum()) for sigma in sigmas]
    ranks = [min(floor, count) for count in counts]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    if left < 0:
        raise ValueError(
            f"ranks_in_budget: `budget` must hold {floor} direction in every layer; got {budget}, "
            f"needed {budget - left}."
        )
    density = [
        (float(value) ** 2 / cost, layer)
        for layer, (sigma, cost) in enumerate(zip(sigmas, costs, strict=True))
        for value in sigma[ranks[layer] : counts[layer]].tolist()
    ]
    # Within a layer the densities descend and a stable sort keeps their order, so what is kept of
    # a layer is always its leading directions.
    for _, layer in sorted(density, key=lambda entry: (-entry[0], entry[1])):
        if costs[layer] <= left:
            ranks[layer] += 1
            left -= costs[layer]
    return ranks


def ranks_by_share(
    worth: Sequence[Tensor], costs: Sequence[int], counts: Sequence[int], tail: float
) -> list[int]:
    """The ranks of all layers at once that hold all but a share `tail` of what directions are worth.

    Directions are given up from the least worth per parameter on, until what is given up would exceed
    tail * sum(worth). Every layer keeps one of the directions it has. Ties go to the earlier layer.

    Args:
        worth: per layer (k_i,), descending, non-negative.
        costs: per layer, parameters of one direction. counts: per layer, how many directions it has.
        tail: share of the sum that may be given up, in [0, 1); 0 gives up none.
    """
    ranks = [int(count) for count in counts]
    known = [row[:rank].tolist() for row, rank in zip(worth, ranks, strict=True)]
    left = tail * sum(map(sum, known))
    density = [
        (value / cost, -layer, value)
        for layer, (row, cost) in enumerate(zip(known, costs, strict=True))
        for value in row[1:]
    ]
    # within a layer they descend, so what is given up of a layer is always its last directions
    for _, layer, value in sorted(density):
        left -= value
        if left < 0 or tail == 0:
            break
        ranks[-layer] -= 1
    return ranks


def settled_ranks(
    sigmas: Sequence[Tensor],
    costs: Sequence[int],
    tail: float,
    budget: int | None,
    worth: Sequence[Tensor] | None = None,
    tail_of_worth: bool = True,
) -> list[int]:
    """The rank of every layer when it is judged: by the tail, then by a budget over all layers.

    A layer keeps one slot even where all its singular values are zero, and it is paid for.

    Args:
        sigmas: per layer (k_i,), descending, non-negative.
        costs, budget: as in `ranks_in_budget`; budget None means no limit.
        tail: as in `ranks_by_share` where it is of worth, else as in `rank_by_tail`.
        worth: per layer (k_i,), descending: what the budget is shared out by; None for sigma^2.
        tail_of_worth: whether the tail is judged by it too.
    """
    if worth is None or not tail_of_worth:
        ranks = [int(rank_by_tail(sigma, tail)) for sigma in sigmas]
    else:
        counts = [int((sigma > 0).sum()) for sigma in sigmas]
        ranks = ranks_by_share(worth, costs, counts, tail)
    if budget is not None:
        empty = sum(cost for rank, cost in zip(ranks, costs, strict=True) if rank == 0)
        if worth is not None:  # a direction that is there counts, whatever it is worth
            sigmas = [values.double().clamp(min=1e-60).sqrt() for values in worth]
        rows = [sigma[:rank] for sigma, rank in zip(sigmas, ranks, strict=True)]
        ranks = ranks_in_budget(rows, costs, budget - empty)
    return [max(1, rank) for rank in ranks]


def leading(ranks: Tensor, k: int) -> Tensor:
    """Mask (*batch, k) of the first ranks[...] of k slots."""
    return torch.arange(k, device=ranks.device) < ranks.unsqueeze(-1)
