"""The only place a tolerance is computed."""

import math

import torch


def bound(dtype: torch.dtype, *dims: int, factor: float = 10.0) -> float:
    """factor * sqrt(max(dims)) * eps(dtype), relative to the norm in play."""
    return factor * math.sqrt(max(dims)) * torch.finfo(dtype).eps


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """||got - expected||_F / ||expected||_F in float64; absolute where expected is zero."""
    got, expected = got.double(), expected.double()
    size = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(got - expected)) / (size or 1.0)
