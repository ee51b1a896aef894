"""Damped inverses: exact, also for zeros and for rows that repeat each other."""

import torch

from geolora.kernels.solve import damped_inverse
from tolerances import bound


def test_it_is_the_inverse_of_the_damped_gram_matrix() -> None:
    X = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    X[1] = 0
    X[2, 1] = X[2, 0]
    inverse = damped_inverse(X, 1e-2)
    assert inverse.dtype == torch.float64
    one = torch.eye(4, dtype=torch.float64)
    gram = X.double() @ X.double().mT + 1e-2 * one
    assert (inverse @ gram - one).abs().max() < bound(torch.float64, 9, factor=1e5)
    assert torch.allclose(inverse[1], 100 * one)


def test_a_damping_far_below_the_rows_does_not_fail() -> None:
    X = torch.ones(6, 50) * 1e3
    assert damped_inverse(X, 1e-6).isfinite().all()
