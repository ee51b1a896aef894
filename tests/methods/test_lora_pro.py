"""LoRA-Pro against its definition: the projection, the nearest factors, moments in either form."""

import pytest
import torch
from torch import Tensor

from geolora.methods.lora_pro import (
    Projections,
    carried,
    dense,
    factor_gradients,
    mean_squares,
    metric,
    normalised,
    projections_of,
)
from reference import basis_of, projection
from tolerances import difference

SCALE = torch.tensor(1.7, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(kind: str) -> tuple[Tensor, Tensor]:
    A, B = normal(3, 7), normal(5, 3, seed=1)
    if kind == "start":
        B = torch.zeros_like(B)
    if kind == "deficient":
        B[:, 2] = B[:, 1]
    if kind == "small":
        B = B * 1e-5
    return A, B


KINDS = ["general", "start", "deficient", "small"]


def projected(M: Tensor, A: Tensor, B: Tensor) -> Tensor:
    empty = B[:, :0]
    return projection(M, basis_of(B) if B.any() else empty, basis_of(A.mT))


@pytest.mark.parametrize("kind", KINDS)
def test_the_equivalent_gradient_is_the_projection(kind: str) -> None:
    A, B = point(kind)
    G = normal(5, 7, seed=2)
    parts, at = projections_of(G, A, B), metric(A, B, ridge=0.0)
    g_A, g_B = factor_gradients(A, B, parts, SCALE, at)
    limit = 1e-4 if kind == "small" else 1e-9
    assert difference(SCALE * (B @ g_A + g_B @ A), projected(G, A, B)) < limit
    assert difference(dense(A, B, parts, at), projected(G, A, B)) < limit


def test_among_all_that_have_this_effect_they_are_nearest_to_loras() -> None:
    A, B = point("general")
    G = normal(5, 7, seed=2)
    g_A, g_B = factor_gradients(A, B, projections_of(G, A, B), SCALE, metric(A, B, ridge=0.0))

    def distance(X: Tensor) -> Tensor:
        on_A = g_A + X @ A - SCALE * B.mT @ G
        on_B = g_B - B @ X - SCALE * G @ A.mT
        return on_A.square().sum() + on_B.square().sum()

    X = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance(X), X)
    assert slope.abs().max() < 1e-9
    assert distance(normal(3, 3, seed=4)) > distance(X)


def test_at_the_start_only_b_moves() -> None:
    A, B = point("start")
    G = normal(5, 7, seed=2)
    g_A, g_B = factor_gradients(A, B, projections_of(G, A, B), SCALE, metric(A, B, ridge=0.0))
    assert not g_A.any()
    assert difference(g_B, G @ A.mT @ torch.linalg.inv(A @ A.mT) / SCALE) < 1e-12


@pytest.mark.parametrize("kind", KINDS[:3])
def test_moments_are_carried_by_projection(kind: str) -> None:
    A, B = point(kind)
    M = projected(normal(5, 7, seed=2), A, B)
    new_A, new_B = A + 0.1 * normal(3, 7, seed=5), B + 0.1 * normal(5, 3, seed=6)
    got = carried(A, B, projections_of(M, A, B), new_A, new_B, metric(A, B, ridge=0.0))
    want = projections_of(M, new_A, new_B)
    assert difference(got.on_A, want.on_A) < 1e-9
    assert difference(got.on_B, want.on_B) < 1e-9


@pytest.mark.parametrize("kind", KINDS[:3])
def test_mean_squares_and_the_normalised_matrix_without_forming_it(kind: str) -> None:
    A, B = point(kind)
    M = projected(normal(5, 7, seed=2), A, B)
    parts, at = projections_of(M, A, B), metric(A, B, ridge=0.0)
    squares = mean_squares(A, B, parts, at)
    assert difference(squares.rows, M.square().mean(1)) < 1e-9
    assert difference(squares.columns, M.square().mean(0)) < 1e-9
    v = squares.rows.unsqueeze(1) * squares.columns / squares.rows.mean()
    want = projections_of(M / v.sqrt(), A, B)
    got = normalised(A, B, parts, squares, at)
    assert difference(got.on_A, want.on_A) < 1e-8
    assert difference(got.on_B, want.on_B) < 1e-8


def test_batched_equals_looped() -> None:
    A, B, G = normal(4, 3, 7), normal(4, 5, 3), normal(4, 5, 7)
    scale = torch.arange(1.0, 5.0, dtype=torch.float64)
    got = factor_gradients(A, B, projections_of(G, A, B), scale)
    for i in range(4):
        want = factor_gradients(A[i], B[i], projections_of(G[i], A[i], B[i]), scale[i])
        assert all(difference(g[i], w) < 1e-12 for g, w in zip(got, want, strict=True))


def test_the_ridge_bounds_how_far_a_goes_along_a_small_column() -> None:
    A, B = point("general")
    B[:, 2] *= 1e-9
    G = normal(5, 7, seed=2)
    g_A, g_B = factor_gradients(A, B, projections_of(G, A, B), SCALE, metric(A, B, ridge=1e-8))
    assert g_A.abs().max() < 10
    full = SCALE * (B @ g_A + g_B @ A)
    assert difference(full, projected(G, A, B[:, :2])) < 1e-6, "the small column counts for nothing"


def test_nothing_seen_moves_nothing() -> None:
    A, B = point("general")
    zero = Projections(
        torch.zeros(3, 7, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    )
    at = metric(A, B, ridge=0.0)
    got = normalised(A, B, zero, mean_squares(A, B, zero, at), at)
    assert not got.on_A.any()
    assert not got.on_B.any()
