"""Damped inverses: exact, also for zeros and for rows that repeat each other."""

import torch

from geolora.kernels.solve import damped_inverse
from tolerances import bound


def test_it_is_the_inverse_of_the_damped_gram_matrix() -> None:
    X = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[1] = 0
    X[2, 1] = X[2, 0]
    gram = X @ X.mT
    before = gram.clone()
    inverse = damped_inverse(gram, 1e-2)
    assert torch.equal(gram, before)
    one = torch.eye(4, dtype=torch.float64)
    assert (inverse @ (gram + 1e-2 * one) - one).abs().max() < bound(torch.float64, 9, factor=1e5)
    assert torch.allclose(inverse[1], 100 * one)
    narrow = damped_inverse(gram.float(), 1e-2)
    assert narrow.dtype == torch.float64
    assert (narrow - inverse).abs().max() < 2e-7 * gram.norm() / 1e-2 * inverse.norm()


def test_a_damping_far_below_the_rows_does_not_fail() -> None:
    X = 1e3 * (torch.ones(6, 50) + 1e-4 * torch.randn(6, 50))
    inverse = damped_inverse(X @ X.mT, 1e-6)
    assert inverse.isfinite().all()
    assert torch.linalg.eigvalsh(inverse).min() > 0
