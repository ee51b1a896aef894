"""Small symmetric systems of many layers at once."""

import torch
from torch import Tensor


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(X X^T + damping I)^-1 from Gram matrices X X^T; float64, whatever their dtype.

    Args:
        gram: (*batch, r, r), symmetric positive semidefinite up to rounding of their dtype.
        damping: above 0, so that a matrix of zeros is no exception.

    Returns:
        (*batch, r, r), symmetric positive definite.

    Precision:
        Relative error about eps ||gram|| / damping, eps that of gram. A damping below its rounding (8 eps of the
        trace) is raised to it, so that the Cholesky factor exists.
    """
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    rounding = 8 * torch.finfo(gram.dtype).eps * diagonal.sum(-1, keepdim=True)
    diagonal.add_(rounding.clamp(min=damping))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
