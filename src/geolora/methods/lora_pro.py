"""LoRA-Pro: factor gradients whose joint effect on W is the gradient's projection to the tangent space.

Paper: Wang, Liang, He, Wang, Tan, "LoRA-Pro: Are low-rank adapters properly optimized?",
    arXiv 2407.18242 (ICLR 2025).
What this file computes: with W = s B A, the (g_A, g_B) for which s (B g_A + g_B A) = P(W)G, nearest to LoRA's
    own gradients (theorem 2.1); Adam's moments in W space, in full (algorithm 1) or in the size of an adapter.
Symbols: as in the paper; P_B and P_A project on the columns of B and the rows of A; a tangent matrix M is
    held by on_A = B^T M (r, d_in) and on_B = M A^T (d_out, r), so LoRA's gradients are s times the projections of G.
Differences from the authors' code: s is the pair's own; eigenvalue problems, so that B = 0 is an ordinary
    point also without a ridge; float64 between the factors and the result.
    The second form is ours: the first moment stays in the tangent space, carried by projection, and the second
    is kept by its row and column means (as in Adafactor, arXiv 1804.04235).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geolora.kernels.decompose import eigh

RIDGE = 1e-8
"""Added to B^T B and A A^T, as the authors do: bounds how far A goes along a column of B that is small."""
TINY = 1e-30
"""Added to mean squares: where nothing was ever seen, nothing moves."""


class Projections(NamedTuple):
    """A tangent matrix M at (A, B): on_A = B^T M (*batch, r, d_in), on_B = M A^T (*batch, d_out, r)."""

    on_A: Tensor
    on_B: Tensor


class Squares(NamedTuple):
    """Mean squares of a matrix: of its rows (*batch, d_out), of its columns (*batch, d_in)."""

    rows: Tensor
    columns: Tensor


class Metric(NamedTuple):
    """Spectra of B^T B and A A^T: eigenvalues a, b and eigenvectors P, Q; and a ridge. float64."""

    a: Tensor
    P: Tensor
    b: Tensor
    Q: Tensor
    ridge: float

    @property
    def of_B(self) -> Tensor:
        """(B^T B + ridge)^-1, or the pseudo-inverse without a ridge."""
        return _inverse(self.a, self.P, self.ridge)

    @property
    def of_A(self) -> Tensor:
        """(A A^T + ridge)^-1, likewise."""
        return _inverse(self.b, self.Q, self.ridge)


def metric(A: Tensor, B: Tensor, ridge: float = RIDGE) -> Metric:
    """The spectra at a pair, A (*batch, r, d_in) and B (*batch, d_out, r)."""
    A, B = A.double(), B.double()
    (a, P), (b, Q) = eigh(B.mT @ B), eigh(A @ A.mT)
    return Metric(a, P, b, Q, ridge)


def factor_gradients(
    A: Tensor, B: Tensor, projections: Projections, scale: Tensor, at: Metric | None = None
) -> tuple[Tensor, Tensor]:
    """(g_A, g_B) with s (B g_A + g_B A) = P(W)M, nearest to LoRA's gradients s B^T M and s M A^T.

        g_A = (B^T B)^+ B^T M / s + X A
        g_B = (I - P_B) M A^T (A A^T)^+ / s - B X
        B^T B X + X A A^T = -(B^T B)^+ B^T M A^T / s

    Args:
        A, B: (*batch, r, d_in), (*batch, d_out, r). projections: of M. scale: (*batch,), s > 0.
        at: `metric(A, B)` where it is known. With its ridge for the pseudo-inverses.

    Returns:
        Tensors like A and B, float64. Where B = 0: g_A = 0.
    """
    at = metric(A, B) if at is None else at
    left, right = _split(B, projections, at)
    A, B = A.double(), B.double()
    X = at.P.mT @ (left @ A.mT) @ at.Q
    sums = at.a.unsqueeze(-1) + at.b.unsqueeze(-2) + 2 * at.ridge
    X = at.P @ torch.where(sums > 0, -X / sums, torch.zeros_like(X)) @ at.Q.mT
    s = scale.double().view(*scale.shape, 1, 1)
    return (left + X @ A) / s, (right - B @ X) / s


def carried(
    A: Tensor, B: Tensor, projections: Projections, new_A: Tensor, new_B: Tensor, at: Metric
) -> Projections:
    """Projections of M carried to the tangent space of the pair (new_A, new_B); shapes of A and B."""
    left, right = _split(B, projections, at)
    return _projections(left, right, A, B, new_A, new_B)


def mean_squares(A: Tensor, B: Tensor, projections: Projections, at: Metric) -> Squares:
    """Mean squares of the rows and columns of a tangent matrix, without forming it; like A and B."""
    left, right = _split(B, projections, at)
    X, Y = torch.cat([B.double(), right], dim=-1), torch.cat([left, A.double()], dim=-2)  # M = X Y
    rows = ((X @ (Y @ Y.mT)) * X).sum(-1).clamp(min=0) / Y.shape[-1]
    columns = ((X.mT @ X @ Y) * Y).sum(-2).clamp(min=0) / X.shape[-2]
    return Squares(rows.to(A.dtype), columns.to(A.dtype))


def normalised(
    A: Tensor, B: Tensor, projections: Projections, squares: Squares, at: Metric
) -> Projections:
    """The projections of N = M / sqrt(v), v_ij = rows_i columns_j / mean(rows): entries of size one, as Adam's."""
    left, right = _split(B, projections, at)
    rows, columns = (square.double() + TINY for square in squares)
    on_rows = (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
    on_columns = columns.rsqrt().unsqueeze(-2)
    # N = (on_rows B) (left on_columns) + (on_rows right) (A on_columns)
    return _projections(on_columns * left, on_rows * right, on_columns * A, on_rows * B, A, B)


def dense(A: Tensor, B: Tensor, projections: Projections, at: Metric) -> Tensor:
    """M itself, (*batch, d_out, d_in), like A."""
    left, right = _split(B, projections, at)
    return (B.double() @ left + right @ A.double()).to(A.dtype)


def projections_of(M: Tensor, A: Tensor, B: Tensor) -> Projections:
    """The projections of any matrix M: those of its projection to the tangent space."""
    return Projections(B.mT @ M, M @ A.mT)


def _split(B: Tensor, projections: Projections, at: Metric) -> tuple[Tensor, Tensor]:
    """left (r, d_in) and right (d_out, r), right orthogonal to B: M = B left + right A. float64."""
    B, on_A, on_B = B.double(), projections.on_A.double(), projections.on_B.double()
    outside = on_B - B @ (at.of_B @ (B.mT @ on_B))
    return at.of_B @ on_A, outside @ at.of_A


def _projections(
    left: Tensor, right: Tensor, A: Tensor, B: Tensor, to_A: Tensor, to_B: Tensor
) -> Projections:
    """The projections at (to_A, to_B) of B left + right A; like to_A and to_B."""
    A, B, new_A, new_B = (factor.double() for factor in (A, B, to_A, to_B))
    on_A = (new_B.mT @ B) @ left + (new_B.mT @ right) @ A
    on_B = B @ (left @ new_A.mT) + right @ (A @ new_A.mT)
    return Projections(on_A.to(to_A.dtype), on_B.to(to_B.dtype))


def _inverse(values: Tensor, vectors: Tensor, ridge: float) -> Tensor:
    """From a spectrum; what is below 1e-13 of the largest value is rounding."""
    if ridge > 0:
        inverse = (values.clamp(min=0) + ridge).reciprocal()
    else:
        real = values > 1e-13 * values[..., -1:].clamp(min=0)
        inverse = torch.where(real, values, torch.ones_like(values)).reciprocal() * real
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT
