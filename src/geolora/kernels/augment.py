"""Orthonormal augmentation of a basis by new directions (GeoLoRA, arXiv 2410.18720, Algorithm 1).

The augmented basis is never formed. It is held as Z T: Z (d, 2r) is [U | K], as it comes, and T (2r, 2r)
makes its columns orthonormal. T comes from the Gram matrix of Z alone, and whatever is done with the basis
is done to T, so a step touches the long dimension d twice: once for the Gram matrix, once for the result.

    Z, gram, C = span(U, K)    # gram = Z^T Z, C = Z^T K
    T = orthonormal(gram, r)   # Z T = [U | U~] has orthonormal columns, or zero ones
    R = T.mT @ C               # K = [U | U~] R
"""

import torch
from torch import Tensor

KEEP = 8.0
"""A complement is kept when its norm exceeds KEEP * eps times the direction it comes from."""


def span(basis: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z of the span of [U | K], whose Gram matrix tells it all; Z^T Z; and Z^T K. In float64.

    A Gram matrix squares what is small: in float64 it resolves 1e-8 of a direction, below the
    8 eps = 1e-6 that count for factors of float32. For these Z = [U | K]. With factors of
    float64 what K adds to U is separated first, by an SVD of the complement, and Z = [U | Q].

    Args:
        basis: U, (*batch, d, r), columns orthonormal to rounding, or zero; not verified.
        directions: K, (*batch, d, k), of any length and any rank.

    Returns:
        Z (*batch, d, r + k), Z^T Z (*batch, r + k, r + k) and Z^T K (*batch, r + k, k).

    Raises:
        ValueError: leading dimensions or d differ.
    """
    if basis.shape[:-1] != directions.shape[:-1]:
        raise ValueError(
            "span: `directions` must share all but the last dimension with `basis`; "
            f"got basis {tuple(basis.shape)} and directions {tuple(directions.shape)}."
        )
    if torch.float64 not in (basis.dtype, directions.dtype):
        *batch, d, r = basis.shape
        rows = basis.new_empty((*batch, r + directions.shape[-1], d), dtype=torch.float64)
        rows[..., :r, :], rows[..., r:, :] = basis.mT, directions.mT
        gram = rows @ rows.mT
        return rows.mT, gram, gram[..., r:]
    U, K = basis.double(), directions.double()
    length = torch.linalg.vector_norm(K, dim=-2, keepdim=True)
    complement = K / torch.where(length > 0, length, torch.ones_like(length))
    for _ in range(2):
        complement = complement - U @ (U.mT @ complement)
    threshold = KEEP * torch.finfo(U.dtype).eps
    size = torch.linalg.vector_norm(complement, dim=-2, keepdim=True)
    complement = torch.where(size > threshold, complement, torch.zeros_like(complement))
    Q, values, _ = torch.linalg.svd(complement, full_matrices=False)  # min(d, k) columns
    keep = values > threshold * values[..., :1].clamp(min=1.0)
    Q = torch.nn.functional.pad(Q * keep.unsqueeze(-2), (0, K.shape[-1] - Q.shape[-1]))
    Z = torch.cat([U, Q], dim=-1)
    return Z, Z.mT @ Z, Z.mT @ K


def orthonormal(gram: Tensor, r: int) -> Tensor:
    """T such that Z T has orthonormal columns, or zero ones, from gram = Z^T Z with Z = [U | K].

    The first r columns of Z T are U, its rounding polished away. The others span what K adds to U;
    where K adds nothing, or its columns repeat each other, they are exactly zero, never arbitrary.
    A part of K counts when it exceeds 8 eps(float32) of the column of K it comes from.

    Args:
        gram: (*batch, r + k, r + k), float64; U^T U within 1e-2 of the identity, zeros on the
            diagonal for columns of U or K that are zero (idle slots).
        r: number of columns of U.

    Precision:
        max|(Z T)^T Z T - diag| is below 20 eps over the square of the smallest part that is kept, at
        worst 5e-3 for parts of 1e-6, which the rounding of float32 leaves uncertain by 6 % anyway.
        The next step's `polish` takes it away.

    Cost:
        An eigenvalue problem of (k, k) per batch member; d does not enter.
    """
    threshold = (KEEP * torch.finfo(torch.float32).eps) ** 2
    turn = polish(gram[..., :r, :r])
    overlap = turn.mT @ gram[..., :r, r:]
    squares = gram.diagonal(dim1=-2, dim2=-1)[..., r:]
    adds = squares - overlap.square().sum(-2) > threshold * squares
    scale = torch.where(adds, squares.rsqrt(), 0.0)  # of unit columns: the rule is relative
    S = (gram[..., r:, r:] - overlap.mT @ overlap) * (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    values, W = torch.linalg.eigh(S)
    keep = values > threshold * values[..., -1:].clamp(min=1.0)
    lengths = torch.where(keep, values.rsqrt(), 0.0)
    new = W * (scale.unsqueeze(-1) * lengths.unsqueeze(-2))
    upper = torch.cat([turn, turn @ (overlap @ -new)], dim=-1)
    return torch.cat([upper, torch.nn.functional.pad(new, (r, 0))], dim=-2)


def polish(gram: Tensor) -> Tensor:
    """N such that U N is orthonormal, from gram = U^T U near the identity: two Newton-Schulz steps.

    An error e becomes (3/4) e^2, twice; zero columns of U stay zero. Keeps rounding from adding up
    over thousands of steps.

    Args:
        gram: (*batch, r, r), within 1e-2 of the identity, or zero rows and columns.
    """
    one = 1.5 * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    first = one - 0.5 * gram
    return first @ (one - 0.5 * (first @ gram @ first))
