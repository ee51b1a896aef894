"""Subspace iteration: exact where it can be, honest about what it has not seen."""

import itertools

import pytest
import torch
from torch import Tensor

from geolora.kernels.sketch import Triplets, missing, random_basis, seen_from_left, seen_from_right
from tolerances import bound, difference


def matrix(d_out: int, d_in: int, sigma: Tensor, seed: int = 0) -> Tensor:
    U, V = random_basis(d_out, len(sigma), seed), random_basis(d_in, len(sigma), seed + 1)
    return U * sigma @ V.mT


def iterate(G: Tensor, k: int, passes: int, seed: int = 5) -> list[Triplets]:
    """Triplets after every pass."""
    basis, found = random_basis(G.shape[1], k, seed), []
    for number in range(passes):
        right = number % 2 == 0
        seen = (seen_from_right if right else seen_from_left)((G if right else G.mT) @ basis, basis)
        basis = seen.U if right else seen.V
        found.append(seen)
    return found


def test_a_basis_is_orthonormal_and_the_same_for_a_seed() -> None:
    V = random_basis(30, 4, 11)
    assert (V.mT @ V - torch.eye(4)).abs().max() < bound(torch.float64, 30)
    assert torch.equal(V, random_basis(30, 4, 11))
    assert not torch.equal(V, random_basis(30, 4, 12))


@pytest.mark.parametrize("d_out, d_in, k", [(20, 30, 5), (30, 20, 5), (3, 40, 3), (40, 2, 2)])
def test_a_rank_that_fits_is_found_by_two_passes(d_out: int, d_in: int, k: int) -> None:
    G = matrix(d_out, d_in, torch.tensor([3.0, 1.0, 1e-3], dtype=torch.float64)[:k])
    seen = iterate(G, k, 2)[-1]
    assert difference(seen.U * seen.sigma @ seen.V.mT, G) < bound(torch.float64, 40)
    for basis in (seen.U, seen.V):
        gram = basis.mT @ basis
        assert (gram - torch.eye(len(gram))).abs().max() < bound(torch.float64, 40)
    assert torch.all(seen.sigma.diff() <= 0)


def test_a_tall_product_of_a_layer_with_fewer_rows_than_directions() -> None:
    G = matrix(3, 40, torch.ones(3, dtype=torch.float64))
    V = random_basis(40, 5, 0)
    seen = seen_from_right(G @ V, V)
    assert [*map(tuple, (seen.U.shape, seen.sigma.shape, seen.V.shape))] == [(3, 3), (3,), (40, 3)]


@pytest.mark.parametrize("decay", [0.9, 0.7, 0.5])
def test_energies_grow_towards_the_best_and_what_is_missing_is_told(decay: float) -> None:
    sigma = decay ** torch.arange(30, dtype=torch.float64)
    best = float(sigma[:2].square().sum())
    for seed in range(5):
        found = iterate(matrix(50, 40, sigma, seed), 4, 7, seed)
        energies = [float(seen.sigma[:2].square().sum()) for seen in found]
        assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(energies))
        assert energies[-1] <= best * (1 + 1e-12)
        for number in range(3, 8):
            truth, told = 1 - energies[number - 1] / best, missing(energies[:number])
            assert told > truth, "rather too much"
            assert number < 5 or told < 20 * truth


def test_what_is_missing_at_the_ends() -> None:
    assert missing([]) == missing([0.0]) == missing([0.0, 0.0]) == 0.0
    assert missing([2.0]) == 1.0
    assert missing([1.0, 2.0, 2.0]) == 0.0
    assert missing([1.0, 2.0, 4.0]) == 1.0  # gains that grow: nothing is known


def test_nothing_to_see() -> None:
    V = random_basis(9, 3, 0)
    seen = seen_from_right(torch.zeros(7, 3), V)
    assert not seen.sigma.any()
    assert (seen.U.mT @ seen.U - torch.eye(3)).abs().max() < bound(torch.float64, 9)
