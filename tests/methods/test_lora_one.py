"""LoRA-One's start against the formula, and what its paper proves about a linear model."""

import pytest
import torch
from torch import Tensor

from geolora.methods import lora_one
from tolerances import bound, difference


def triplets(G: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, Vt = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r], sigma[:r], Vt[:r].mT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", [1.0, 0.0442])
def test_it_is_the_best_part_of_a_step_down_the_gradient(norm: float) -> None:
    G = normal(12, 9)
    U, sigma, V = triplets(G, 4)
    best = U * sigma @ V.mT
    W = (lambda u, s, v: u * s @ v.mT)(*lora_one.start(U, sigma, V, norm))
    assert difference(W, -norm * best / sigma[0]) < bound(torch.float64, 12)
    assert torch.linalg.matrix_norm(W, 2) == pytest.approx(norm)


def test_directions_the_gradient_does_not_have_are_zero() -> None:
    G = normal(12, 2) @ normal(2, 9, seed=1)
    _, sigma, _ = lora_one.start(*triplets(G, 4), 0.1)
    assert int((sigma > 0).sum()) == 2
    _, sigma, _ = lora_one.start(*triplets(torch.zeros(5, 5), 3), 0.1)
    assert not sigma.any()


def test_the_start_is_the_one_step_that_solves_an_isotropic_linear_model() -> None:
    """Theorem 3.3 in its clean case: X^T X = N, scale sigma_1 / 1: W0 is the target itself."""
    target = normal(10, 3) @ normal(3, 8, seed=1)
    X = torch.linalg.qr(normal(40, 8, seed=2))[0] * 40**0.5
    G = -(X @ target.mT).mT @ X / 40  # of 1/2 ||X (W - target)^T||^2 / N at W = 0
    U, sigma, V = triplets(G, 3)
    start = lora_one.start(U, sigma, V, float(sigma[0]))
    assert difference(start[0] * start[1] @ start[2].mT, target) < bound(torch.float64, 40)
