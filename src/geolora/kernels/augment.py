"""Orthonormal augmentation of a basis by new directions (GeoLoRA, arXiv 2410.18720, Algorithm 1)."""

import torch
from torch import Tensor

KEEP = 8.0
"""A complement is kept when its norm exceeds KEEP * eps times the direction it comes from."""


def augment(basis: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Extend an orthonormal basis so that it also spans the given directions.

    With U = basis and K = directions, returns Q and R such that

        Q^T U = 0,    Q^T Q = diag(0 or 1),    K = U U^T K + Q R,    R = Q^T K.

    [U | Q] is the augmented basis; U itself is not touched, so the first columns are unchanged by
    construction. Where K adds nothing to U, or its columns repeat each other, columns of Q are
    exactly zero (and last), never arbitrary. Zero columns of U and K (idle slots) are allowed.

    Args:
        basis: U, (*batch, d, r), columns orthonormal or zero; not verified.
        directions: K, (*batch, d, k), of any length and any rank.

    Returns:
        Q (*batch, d, k) and R (*batch, k, k), in float32 or the wider dtype of the inputs.

    Precision:
        max|Q^T Q - diag| and max|U^T Q| are below 10 * sqrt(d) * eps.

    Cost:
        O(d (r + k) k) flops, two Householder QRs of (d, k) and an SVD of (k, k) per batch member.

    Raises:
        ValueError: leading dimensions or d differ.
    """
    if basis.shape[:-1] != directions.shape[:-1]:
        raise ValueError(
            "augment: `directions` must share all but the last dimension with `basis`; "
            f"got basis {tuple(basis.shape)} and directions {tuple(directions.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(basis.dtype, directions.dtype), torch.float32)
    U, K = basis.to(dtype), directions.to(dtype)
    k = K.shape[-1]
    threshold = KEEP * torch.finfo(dtype).eps

    # Unit columns first: the rule is relative to each direction, whatever its length.
    length = _norms(K)
    X = K / torch.where(length > 0, length, torch.ones_like(length))
    X = X - U @ (U.mT @ X)
    X = X - U @ (U.mT @ X)
    X = torch.where(_norms(X) > threshold, X, torch.zeros_like(X))

    # QR alone invents columns where X repeats itself; the SVD of its small factor puts what X
    # really spans first, and the rest is dropped.
    Q, R = torch.linalg.qr(X)  # (*batch, d, m), (*batch, m, k) with m = min(d, k)
    P, sv, _ = torch.linalg.svd(R)
    keep = (sv > threshold * sv[..., :1].clamp(min=1.0)).unsqueeze(-2).to(dtype)
    Q = (Q @ P) * keep
    # A short complement comes out of the division by its length with an error along U.
    Q = Q - U @ (U.mT @ Q)
    Q = torch.linalg.qr(Q)[0] * keep
    if Q.shape[-1] < k:
        Q = torch.nn.functional.pad(Q, (0, k - Q.shape[-1]))
    return Q, Q.mT @ K


def polish(basis: Tensor) -> Tensor:
    """Restore the orthonormality of a nearly orthonormal basis by one Newton-Schulz step.

    U <- U (3 I - U^T U) / 2: an error e becomes (3/4) e^2, zero columns stay zero. Keeps rounding
    from adding up over thousands of steps.

    Args:
        basis: U, (*batch, d, r), columns orthonormal to about 1e-3, or zero.
    """
    gram = basis.mT @ basis
    return 1.5 * basis - 0.5 * (basis @ gram)


def _norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
