"""Small problems: what is settled without a decomposition equals what one gives, and failures are repaired."""

import pytest
import torch
from torch import Tensor

from geolora.kernels import decompose
from geolora.kernels.decompose import eigh, inverse_root, leading_eigenvectors, polar

N, K = 12, 5
LIMIT = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_gram(X: Tensor) -> Tensor:
    """Gram matrices of columns of length one, or zero."""
    length = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    X = X / torch.where(length > 0, length, 1.0)
    return X.mT @ X


def projector(Q: Tensor) -> Tensor:
    return Q @ Q.mT


def test_columns_are_made_orthonormal_whether_they_depend_on_each_other_or_not() -> None:
    X = normal(N, 20, K)
    X[1, :, 2] = X[1, :, 0]  # a repeated column
    X[2, :, 3] = 0.0  # an idle slot
    X[3, :, 1] = X[3, :, 0] + 1e-5 * X[3, :, 1]  # nearly dependent
    X[4] = 0.0
    gram = unit_gram(X)
    T = inverse_root(gram, 1e-12)
    seen = T.mT @ gram @ T
    there = seen.diagonal(dim1=-2, dim2=-1) > 0.5
    assert (seen - torch.diag_embed(there.double())).abs().max() < 1e-5
    assert there.sum(-1).tolist() == [5, 4, 4, 5, 0, *[5] * (N - 5)]
    assert not T[2][:, ~there[2]].any(), "zero, not arbitrary"
    assert not T[4].any()
    # what is spanned is the space of the columns
    assert (gram @ T @ T.mT @ gram - gram).abs().max() < 1e-5


def test_the_nearest_rotation_is_found_of_singular_matrices_too() -> None:
    M = normal(N, K, K)
    M[1] = torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 1e-12]))  # nearly singular
    M[2, :, 3] = 0.0  # a slot that was idle
    M[3] = 0.0
    M[4] *= 1e-150
    Q = polar(M)
    assert (Q.mT @ Q - torch.eye(K)).abs().max() < 1e-13
    P, values, Rt = torch.linalg.svd(M)
    assert torch.allclose((Q.mT @ M).diagonal(dim1=-2, dim2=-1).sum(-1), values.sum(-1), rtol=1e-9)
    unique = values[:, -1] > 0
    assert (Q - P @ Rt)[unique].abs().max() < 1e-8


def near_diagonal(step: float, ranks: list[int]) -> Tensor:
    """core^T core for cores diag(sigma, 0) and a step, with as many singular values in use as said."""
    core = torch.zeros(len(ranks), 2 * K, 2 * K, dtype=torch.float64)
    for layer, rank in zip(core, ranks, strict=True):
        layer[range(rank), range(rank)] = torch.linspace(3.0, 1.0, rank).double()
        inside = [*range(rank), *range(K, K + rank)]
        move = normal(2 * rank, 2 * rank, seed=rank)
        move[rank:, rank:] = 0.0
        layer[torch.tensor(inside)[:, None], torch.tensor(inside)] += step * move
    return core.mT @ core


@pytest.mark.parametrize("step", [1e-3, 0.02, 0.5, 3.0])
def test_the_leading_space_is_that_of_all_eigenvectors(
    step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [K, 3, 1, K]
    gram = near_diagonal(step, ranks)
    gram = torch.cat([gram, torch.zeros_like(gram[:1])])  # and a layer at W = 0
    ranks.append(2)
    decomposed = []

    def counted(matrices: Tensor) -> tuple[Tensor, Tensor]:
        decomposed.append(matrices.shape)
        return eigh(matrices)

    monkeypatch.setattr(decompose, "eigh", counted)
    values, Q = leading_eigenvectors(gram, torch.tensor(ranks), K)
    wanted, vectors = torch.linalg.eigh(gram)
    for i, rank in enumerate(ranks):
        lead = wanted[i].flip(-1)[:rank]
        assert torch.allclose(values[i, :rank], lead, rtol=1e-8, atol=1e-12)
        if lead[0] > 0:
            expected = projector(vectors[i].flip(-1)[:, :rank])
            assert (projector(Q[i, :, :rank]) - expected).abs().max() < 2e-6
    whole = [shape[0] for shape in decomposed if shape[-1] == 2 * K]
    assert len(whole) == 1, "once, and for the layers that need it alone"
    assert whole[0] == 1 if step <= 0.02 else whole[0] > 1


def test_a_problem_that_does_not_converge_is_solved_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gram = unit_gram(normal(N, 20, K))
    wanted = torch.linalg.eigh(gram)
    solve = torch.linalg.eigh

    def failing(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if matrices.dim() > 2 or torch.equal(matrices, gram[3]):
            raise torch.linalg.LinAlgError("failed to converge")  # pyright: ignore
        return solve(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.warns(RuntimeWarning, match="did not converge .failed to converge.; solved by"):
        values, vectors = eigh(gram)
    assert (values - wanted[0]).abs().max() < LIMIT
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    assert (rebuilt - gram).abs().max() < LIMIT
