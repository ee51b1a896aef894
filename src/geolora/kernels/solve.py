"""Small symmetric systems of many layers at once."""

import torch
from torch import Tensor


def damped_inverse(rows: Tensor, damping: float) -> Tensor:
    """(X X^T + damping I)^-1 for the rows of X; float64, whatever the dtype of X.

    Args:
        rows: X, (*batch, r, d).
        damping: above 0, so that rows of zeros are no exception.

    Returns:
        (*batch, r, r), symmetric positive definite.

    Precision:
        The Gram matrix is formed in float64, where it is positive semidefinite to 1e-16 of its norm: its
        Cholesky factor exists for any damping above that.
    """
    X = rows.double()
    gram = X @ X.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))
