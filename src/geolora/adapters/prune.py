"""Ranks of an adapter in a model, and cutting them: by a tail, to a budget, or for trial at several budgets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geolora.errors import SettingError
from geolora.kernels.truncate import settled_ranks
from geolora.pairs.find import Pair, check_budget, find_pairs
from geolora.pairs.point import read_pair, slot_ranks, to_pair
from geolora.pairs.sharded import write_factors


@dataclass(frozen=True)
class BudgetScore:
    """What a trained adapter scores when it is cut to a budget, without training on.

    Attributes:
        adapter_parameters: sum of rank * (d_in + d_out) of what is left.
        exported_parameters: numbers in the uniform file of it.
        error: ||what was cut||_F / ||W||_F over all layers.
        score: what `evaluate` returned.
    """

    budget: int
    adapter_parameters: int
    exported_parameters: int
    error: float
    score: float


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """{layer: settled rank}: active slots, without those that have not been judged yet.

    Args:
        model: a model with LoRA layers, trained by geolora or not. Where it is sharded (FSDP2) every
            process must call, here, in `prune` and in `export`.
        adapter_name: which adapter; None for the active one.
    """
    return {
        pair.name: active - trials
        for pair in find_pairs(model, adapter_name, with_sharded=True)
        for active, trials in [slot_ranks(*pair.gathered())]
    }


@torch.no_grad()
def prune(
    model: nn.Module,
    tail: float = 0.25,
    budget: int | None = None,
    adapter_name: str | None = None,
) -> dict[str, int]:
    """Judge every layer now: cut by `tail`, then to a `budget` over all layers; in place.

    The pairs keep their shape: what is cut is zero on both sides. An optimizer notices and goes on
    from what is left. Works on any LoRA adapter.

    Args:
        tail: fraction of ||sigma||_2 a layer may lose, in [0, 1).
        budget: adapter parameters to keep at most, sum of rank * (d_in + d_out).

    Returns:
        {layer: rank}.

    Raises:
        SettingError: tail outside [0, 1). BudgetError: less than one direction per layer.
    """
    if not 0 <= tail < 1:
        raise SettingError(f"prune: `tail` must be in [0, 1); got {tail}.")
    pairs = find_pairs(model, adapter_name, with_sharded=True)
    costs = [pair.cost for pair in pairs]
    check_budget(costs, budget)
    readings = [read_pair(*pair.gathered(), pair.scale) for pair in pairs]
    kept = settled_ranks([reading.sigma for reading in readings], costs, tail, budget)
    result = {}
    for pair, reading, rank in zip(pairs, readings, kept, strict=True):
        active = int((reading.sigma > 0).sum())
        result[pair.name] = min(rank, active)
        if not active:  # nothing but probes: keep them, or the layer would never see a gradient
            continue
        keep = (torch.arange(pair.r, device=reading.sigma.device) < rank).double()
        A, B = to_pair(
            reading.U * keep,
            reading.sigma * keep,
            reading.V * keep,
            torch.tensor(pair.scale, device=keep.device).double(),
            torch.tensor(pair.r, device=keep.device),
        )
        write_factors([pair.A, pair.B], [A, B])
    return result


def suggest_budget(
    model: nn.Module,
    evaluate: Callable[[], float],
    shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    adapter_name: str | None = None,
) -> list[BudgetScore]:
    """Score against parameters, from the spectra of one trained adapter.

    The adapter is cut to each budget as `prune` does (tail 0), scored, and put back as it was: what a
    smaller budget would cost at least in part; a run trained within it mostly loses less.

    Args:
        evaluate: scores the model as it stands, on rows that were not trained on.
        shares: budgets as shares, in (0, 1], of the parameters in use. Those that do not hold one
            direction in every layer are left out.

    Returns:
        A row per budget, from the smallest on.

    Raises:
        SettingError: a share outside (0, 1].
    """
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise SettingError(f"suggest_budget: `shares` must be in (0, 1]; got {wrong[0]}.")
    pairs = find_pairs(model, adapter_name, with_sharded=True)
    cost = {pair.name: pair.cost for pair in pairs}
    used = sum(rank * cost[name] for name, rank in ranks(model, adapter_name).items())
    trained = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
    norm = _norm(pairs)
    rows = []
    try:
        for share in sorted(set(shares)):
            budget = round(share * used)
            if budget < sum(cost.values()):
                continue
            _put_back(pairs, trained)
            left = prune(model, 0.0, budget, adapter_name)
            cut = max(0.0, norm**2 - _norm(pairs) ** 2) ** 0.5  # at right angles to what is left
            rows.append(
                BudgetScore(
                    budget=budget,
                    adapter_parameters=sum(rank * cost[name] for name, rank in left.items()),
                    exported_parameters=max(1, *left.values()) * sum(cost.values()),
                    error=cut / norm if norm else 0.0,
                    score=float(evaluate()),
                )
            )
    finally:
        _put_back(pairs, trained)
    return rows


@torch.no_grad()
def _put_back(pairs: list[Pair], factors: list[tuple[Tensor, Tensor]]) -> None:
    for pair, (A, B) in zip(pairs, factors, strict=True):
        pair.A.copy_(A)
        pair.B.copy_(B)


def _norm(pairs: list[Pair]) -> float:
    """||W||_F over all layers."""
    sigmas = [read_pair(*pair.gathered(), pair.scale).sigma for pair in pairs]
    return sum(float((sigma.double() ** 2).sum()) for sigma in sigmas) ** 0.5
