"""Preconditioned gradients: the formula, and the rate that LoRA-One's paper proves (Theorem 4.2)."""

import pytest
import torch
from torch import Tensor

from geolora.methods.riemannian import precondition
from tolerances import bound, difference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_formula() -> None:
    A, B, on_A, on_B = normal(2, 3, 7), normal(2, 5, 3), normal(2, 3, 7, seed=1), normal(2, 5, 3)
    got_A, got_B = precondition(A, B, on_A, on_B, 0.1)
    one = 0.1 * torch.eye(3, dtype=torch.float64)
    for i in range(2):
        want_A = torch.linalg.solve(B[i].mT @ B[i] + one, on_A[i])
        want_B = torch.linalg.solve(A[i] @ A[i].mT + one, on_B[i].mT).mT
        assert difference(got_A[i], want_A) < bound(torch.float64, 7, factor=1e3)
        assert difference(got_B[i], want_B) < bound(torch.float64, 7, factor=1e3)


def test_w_moves_by_the_two_projections_whatever_the_gauge() -> None:
    A, B, G = normal(3, 7), normal(5, 3), normal(5, 7, seed=2)
    gauge = torch.diag(torch.tensor([10.0, 1.0, 0.01], dtype=torch.float64))
    moves = []
    for T in (torch.eye(3, dtype=torch.float64), gauge):
        a, b = torch.linalg.inv(T) @ A, B @ T
        on_A, on_B = precondition(a, b, b.mT @ G, G @ a.mT, 1e-12)
        moves.append(b @ on_A + on_B @ a)
    U, V = torch.linalg.qr(B)[0], torch.linalg.qr(A.mT)[0]
    assert difference(moves[0], U @ U.mT @ G + G @ V @ V.mT) < 1e-9
    assert difference(moves[1], moves[0]) < 1e-6


def errors(condition: float, lr: float, steps: int, damping: float | None) -> list[float]:
    """||W - target||_F over descent on 1/2 ||W - target||^2, from a start half way along its best part."""
    sigma = torch.logspace(0, -torch.log10(torch.tensor(condition)), 3, dtype=torch.float64)
    U, V = torch.linalg.qr(normal(12, 3))[0], torch.linalg.qr(normal(9, 3, seed=1))[0]
    target = U * sigma @ V.mT
    B, A = U * (sigma / 2).sqrt(), ((sigma / 2).sqrt() * V).mT
    found = []
    for _ in range(steps):
        G = B @ A - target
        found.append(float(G.norm() / target.norm()))
        on_A, on_B = B.mT @ G, G @ A.mT
        if damping is not None:
            on_A, on_B = precondition(A, B, on_A, on_B, damping)
        A, B = A - lr * on_A, B - lr * on_B
    return found


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_rate_does_not_depend_on_the_condition_number(condition: float) -> None:
    lr = 0.5
    found = errors(condition, lr, 60, 1e-14)
    for t, error in enumerate(found):  # Theorem 4.2: (1 - lr / 4)^t of the start
        assert error <= (1 - lr / 4) ** t * found[0] * (1 + 1e-9) + 1e-9


def test_without_it_the_rate_does() -> None:
    small = [value[-1] / value[0] for value in (errors(k, 0.5, 60, None) for k in (1.0, 1e2))]
    assert small[0] < 1e-6
    assert errors(1e2, 0.5, 60, None)[-1] > 1e3 * errors(1e2, 0.5, 60, 1e-14)[-1]
