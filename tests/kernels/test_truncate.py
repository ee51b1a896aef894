"""Rank decisions from known singular values."""

import itertools

import pytest
import torch

from geolora.kernels.truncate import (
    leading,
    numerical_rank,
    rank_by_tail,
    ranks_by_share,
    ranks_in_budget,
    settled_ranks,
)
from geolora.methods.geolora import kept
from tolerances import bound, difference

SIGMA = torch.tensor([4.0, 3.0, 1.0, 0.5, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tail_is_relative_and_exact_at_the_edge(dtype: torch.dtype) -> None:
    sigma, size = SIGMA.to(dtype), float(SIGMA.norm())
    rests = [float(SIGMA[r:].norm()) / size for r in range(5)]
    for rank, rest in enumerate(rests):
        if rest < 1:
            assert int(rank_by_tail(sigma, rest * (1 + 1e-6))) == rank
            assert int(rank_by_tail(sigma, rest * (1 - 1e-6))) == (rank + 1 if rest else rank)
    assert int(rank_by_tail(1e-20 * sigma, 0.1)) == int(rank_by_tail(sigma, 0.1))


def test_tail_zero_drops_zeros_only_and_all_zero_is_rank_zero() -> None:
    assert int(rank_by_tail(SIGMA, 0.0)) == 4
    assert int(rank_by_tail(torch.zeros(5), 0.1)) == 0
    tiny = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    assert int(rank_by_tail(tiny, 0.0)) == 2, "small values are not lost in a sum"


def test_tail_is_monotone_and_batched() -> None:
    batch = torch.stack([SIGMA, SIGMA.flip(0).sort(descending=True)[0] * 7, torch.zeros(5)])
    ranks = [rank_by_tail(batch, tail) for tail in (0.0, 0.05, 0.1, 0.2, 0.5, 0.9)]
    assert all(bool((a >= b).all()) for a, b in itertools.pairwise(ranks))
    loop = [int(rank_by_tail(row, 0.2)) for row in batch]
    assert rank_by_tail(batch, 0.2).tolist() == loop


def test_relative_truncation_is_not_idempotent() -> None:
    """Why ranks are judged once per cycle: every pass finds a new tail (dossier 1f.11)."""
    sigma = torch.tensor([1.0] + [0.14] * 15, dtype=torch.float64)
    ranks = []
    for _ in range(20):
        sigma = sigma[: int(rank_by_tail(sigma, 0.15))]
        ranks.append(len(sigma))
    assert ranks[:15] == list(range(15, 0, -1))


def test_cut_errs_by_the_discarded_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(2, 12, 5, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(2, 9, 5, generator=generator, dtype=torch.float64))[0]
    sigma = torch.stack([SIGMA, SIGMA])
    keep = kept(sigma, torch.tensor([2, 1]))
    lost = (U * sigma.unsqueeze(-2)) @ V.mT - (U * (sigma * keep).unsqueeze(-2)) @ V.mT
    expected = torch.stack([SIGMA[2:].norm(), SIGMA[1:].norm()])
    assert difference(lost.flatten(1).norm(dim=1), expected) < bound(torch.float64, 12)


def test_numerical_rank_and_mask() -> None:
    assert numerical_rank(torch.tensor([[1.0, 1e-3, 1e-9], [0, 0, 0]]), 1e-7).tolist() == [2, 0]
    assert leading(torch.tensor([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]


def best_energy(sigmas: list[torch.Tensor], costs: list[int], budget: int) -> float:
    best = -1.0
    for ranks in itertools.product(*[range(1, len(s) + 1) for s in sigmas]):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            best = max(
                best, sum(float((s[:r] ** 2).sum()) for s, r in zip(sigmas, ranks, strict=True))
            )
    return best


def test_budget_is_kept_and_spent_on_energy() -> None:
    generator = torch.Generator().manual_seed(3)
    sigmas = [
        torch.rand(4, generator=generator).double().sort(descending=True)[0] for _ in range(3)
    ]
    for cost, budget in itertools.product(([5, 5, 5], [4, 9, 6]), range(20, 61, 5)):
        ranks = ranks_in_budget(sigmas, cost, budget)
        spent = sum(r * c for r, c in zip(ranks, cost, strict=True))
        energy = sum(float((s[:r] ** 2).sum()) for s, r in zip(sigmas, ranks, strict=True))
        assert spent <= budget
        assert all(rank >= 1 for rank in ranks)
        best = best_energy(sigmas, cost, budget)
        # with equal costs the greedy choice is the best one; else within one direction of it
        assert energy == pytest.approx(best) if len(set(cost)) == 1 else energy >= 0.8 * best


def test_budget_prefers_the_larger_directions_whatever_their_layer() -> None:
    big, small = torch.tensor([9.0, 8.0, 7.0]), torch.tensor([3.0, 2.0, 1.0])
    assert ranks_in_budget([small, big], [10, 10], 40) == [1, 3]
    assert ranks_in_budget([big, big], [10, 10], 30) == [2, 1], "ties go to the earlier layer"
    assert ranks_in_budget([big, torch.zeros(3)], [10, 10], 100) == [3, 0]


def test_budget_too_small_names_what_is_needed() -> None:
    with pytest.raises(ValueError, match="`budget`.*got 19, needed 20"):
        ranks_in_budget([SIGMA, SIGMA], [10, 10], 19)


def test_settled_ranks_cut_by_tail_then_budget() -> None:
    sigmas = [SIGMA, 2 * SIGMA, torch.zeros(5)]
    assert settled_ranks(sigmas, [10, 10, 10], 0.0, None) == [4, 4, 1]
    assert settled_ranks(sigmas, [10, 10, 10], 0.3, None) == [2, 2, 1]
    kept = settled_ranks(sigmas, [10, 10, 10], 0.0, 50)
    assert sum(kept) * 10 <= 50, "an empty layer's slot is paid for"
    assert kept == [2, 2, 1]


@pytest.mark.parametrize("tail", [0.0, 0.1, 0.3, 0.9])
def test_ranks_by_share_give_up_the_least_per_parameter_and_no_more_than_the_share(
    tail: float,
) -> None:
    """Against all choices of ranks: of those that give up no more, as many parameters go as the greedy order says."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        worth = [
            torch.rand(3, generator=generator).double().sort(descending=True)[0] for _ in "abc"
        ]
        costs, counts = [5, 8, 20], [3, 2, 3]
        ranks = ranks_by_share(worth, costs, counts, tail)
        assert all(1 <= rank <= count for rank, count in zip(ranks, counts, strict=True))
        total = sum(float(row[:count].sum()) for row, count in zip(worth, counts, strict=True))
        lost = [row[rank:count] for row, rank, count in zip(worth, ranks, counts, strict=True)]
        assert sum(float(row.sum()) for row in lost) <= tail * total + 1e-12
        gone = [float(v) / c for row, c in zip(lost, costs, strict=True) for v in row]
        kept = [
            (float(row[i]) / cost, float(row[i]))
            for row, rank, cost in zip(worth, ranks, costs, strict=True)
            for i in range(1, rank)
        ]
        assert not gone or not kept or max(gone) <= min(kept)[0]
        if kept:  # the next to go would be too much
            assert sum(float(row.sum()) for row in lost) + min(kept)[1] > tail * total
        if tail == 0:
            assert ranks == counts


def test_a_share_of_nothing_keeps_one_direction() -> None:
    assert ranks_by_share([torch.zeros(3), torch.ones(2)], [1, 1], [3, 2], 0.2) == [1, 2]
    assert ranks_by_share([torch.zeros(3)], [1], [0], 0.2) == [0]
