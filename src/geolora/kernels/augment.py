"""Orthonormal augmentation of a basis by new directions (GeoLoRA, arXiv 2410.18720, Algorithm 1).

The augmented basis is never formed. It is held as Z T: Z (d, 2r) is [U | K], as it comes, and T (2r, 2r)
makes its columns orthonormal. T comes from Gram matrices alone, and whatever is done with the basis
is done to T, so a step touches the long dimension d twice: once for the Gram matrices, once for the result.

    span = span_of(U, K)
    T = orthonormal(span.gram, r)   # Z T = [U | U~] has orthonormal columns, or zero ones
    R = T.mT @ span.inside            # K = [U | U~] R
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geolora.kernels.decompose import inverse_root

KEEP = 8.0
"""A complement is kept when its norm exceeds KEEP * eps times the direction it comes from."""


class Span(NamedTuple):
    """Z of the span of [U | K], and what its Gram matrix holds; d does not enter any more.

    Q: None where Z = [U | K]; else (*batch, d, k), for Z = [U | Q].
    gram: Z^T Z (*batch, r + k, r + k), float64.
    inside: Z^T [K | others] (*batch, r + k, k + ...), float64.
    square: K^T K (*batch, k, k), float64.
    """

    Q: Tensor | None
    gram: Tensor
    inside: Tensor
    square: Tensor


def span_of(basis: Tensor, directions: Tensor, *others: Tensor) -> Span:
    """The span of [U | K], and how K and other matrices lie in it.

    A Gram matrix squares what is small: in float64 it resolves 1e-8 of a direction, below the
    8 eps = 1e-6 that count for factors of float32. For these Z = [U | K]. With factors of
    float64 what K adds to U is separated first, by an SVD of the complement, and Z = [U | Q].

    Args:
        basis: U, (*batch, d, r), columns orthonormal to rounding, or zero; not verified.
        directions: K, (*batch, d, k), of any length and any rank.
        others: (*batch, d, ...), not in the span.

    Raises:
        ValueError: leading dimensions or d differ.
    """
    if any(matrix.shape[:-1] != basis.shape[:-1] for matrix in (directions, *others)):
        raise ValueError(
            "span_of: `directions` must share all but the last dimension with `basis`; "
            f"got basis {tuple(basis.shape)} and {[tuple(m.shape) for m in (directions, *others)]}."
        )
    r, k = basis.shape[-1], directions.shape[-1]
    if torch.float64 not in (basis.dtype, directions.dtype):
        rows = _rows(basis, directions, *others)
        table = (rows[..., : r + k, :] if others else rows) @ rows.mT
        return Span(None, table[..., : r + k], table[..., r:], table[..., r:, r : r + k])
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
    Q = torch.nn.functional.pad(Q * keep.unsqueeze(-2), (0, k - Q.shape[-1]))
    rows = torch.cat([U.mT, Q.mT], dim=-2)
    inside = rows @ torch.cat([K, *(matrix.double() for matrix in others)], dim=-1)
    return Span(Q, rows @ rows.mT, inside, K.mT @ K)


def _rows(*matrices: Tensor) -> Tensor:
    """The columns of matrices (*batch, d, ...) as rows, in float64."""
    *batch, d, _ = matrices[0].shape
    widths = [matrix.shape[-1] for matrix in matrices]
    rows = matrices[0].new_empty((*batch, sum(widths), d), dtype=torch.float64)
    for block, matrix in zip(rows.split(widths, dim=-2), matrices, strict=True):
        block.copy_(matrix.mT)
    return rows


def stack_spans(spans: Sequence[Span]) -> Span:
    """Spans of stacks of layers, of any d, as one of all their layers."""
    if len(spans) == 1:
        return spans[0]
    fields = (torch.cat(field) for field in zip(*(span[1:] for span in spans), strict=True))
    return Span(None, *fields)


def combine(span: Span, basis: Tensor, directions: Tensor, on: Tensor) -> Tensor:
    """(Z on)^T (*batch, ..., d), in the dtype of U, for on (*batch, r + k, ...)."""
    second = directions if span.Q is None else span.Q
    rows = torch.cat([basis.mT, second.mT], dim=-2)
    return (on.mT.to(rows.dtype) @ rows).to(basis.dtype)


def orthonormal(gram: Tensor, r: int) -> Tensor:
    """T such that Z T has orthonormal columns, or zero ones, from gram = Z^T Z with Z = [U | K].

    The first r columns of Z T are U, its rounding polished away. The others span what K adds to U;
    where K adds nothing, or its columns repeat each other, they are exactly zero, never arbitrary.
    A part of K counts when it exceeds 8 eps(float32) of the column of K it comes from.

    Args:
        gram: (N, r + k, r + k), float64; U^T U within 1e-2 of the identity, zeros on the
            diagonal for columns of U or K that are zero (idle slots).
        r: number of columns of U.

    Precision:
        max|(Z T)^T Z T - diag| is below 20 eps over the square of the smallest part that is kept, at
        worst 5e-3 for parts of 1e-6, which the rounding of float32 leaves uncertain by 6 % anyway.
        The next step's `polish` takes it away.

    Cost:
        A triangular factor of (k, k) per layer, or an eigenvalue problem; d does not enter.
    """
    threshold = (KEEP * torch.finfo(torch.float32).eps) ** 2
    turn = polish(gram[..., :r, :r])
    overlap = turn.mT @ gram[..., :r, r:]
    squares = gram.diagonal(dim1=-2, dim2=-1)[..., r:]
    adds = squares - overlap.square().sum(-2) > threshold * squares
    scale = torch.where(adds, squares.rsqrt(), 0.0)  # of unit columns: the rule is relative
    S = (gram[..., r:, r:] - overlap.mT @ overlap) * (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    added = scale.unsqueeze(-1) * inverse_root(S, threshold)
    upper = torch.cat([turn, turn @ (overlap @ -added)], dim=-1)
    return torch.cat([upper, torch.nn.functional.pad(added, (r, 0))], dim=-2)


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
