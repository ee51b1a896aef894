"""The tangent space of the fixed-rank manifold at W = U diag(sigma) V^T.

A tangent matrix is held as its two parts K = M V (d_out, r) and L = M^T U (d_in, r), which are just
what one backward pass gives for M = G:

    M = K V^T + U L^T - U C V^T,    C = U^T K = (V^T L)^T.

Columns of U and V that are zero (idle slots) simply do not take part, and a column of V whose
column of U is zero (a probe) adds the one-sided direction G v v^T.
"""

import torch
from torch import Tensor


def project(G: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of P(W)G = U U^T G + G V V^T - U U^T G V V^T.

    Args:
        G: (*batch, d_out, d_in), any matrix.
        U: (*batch, d_out, r), orthonormal or zero columns.
        V: (*batch, d_in, r), orthonormal or zero columns.

    Returns:
        K = G V (*batch, d_out, r) and L = G^T U (*batch, d_in, r).
    """
    return G @ V, G.mT @ U


def to_dense(K: Tensor, L: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The tangent matrix (*batch, d_out, d_in) whose parts are K and L."""
    return (K - U @ (U.mT @ K)) @ V.mT + U @ L.mT


def transport(
    K: Tensor, L: Tensor, U: Tensor, V: Tensor, U_new: Tensor, V_new: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry a tangent matrix to another point by orthogonal projection.

    Returns the parts M V' and M^T U' of P(W')M, without forming M. Idempotent, linear, never longer
    than M, and blind to the gauge of either point. (Geometric momentum: arXiv 2506.17475.)

    Args:
        K, L: parts of M at (U, V).
        U, V: the old bases (*batch, d_out, r), (*batch, d_in, r).
        U_new, V_new: the new bases, of any number of columns.
    """
    K_new, L_new = K @ (V.mT @ V_new), L @ (U.mT @ U_new)
    K_new = K_new + U @ (L.mT @ V_new - U.mT @ K_new)
    L_new = L_new + V @ (K.mT @ U_new - V.mT @ L_new)
    return K_new, L_new


def norm(K: Tensor, L: Tensor, U: Tensor) -> Tensor:
    """Frobenius norm (*batch,) of the tangent matrix M with parts K and L.

    ||M||^2 = ||K||^2 + ||L||^2 - ||U^T K||^2.
    """
    K, L, overlap = (torch.linalg.matrix_norm(X).square() for X in (K, L, U.mT @ K))
    return (K + L - overlap).clamp(min=0).sqrt()


def core_of(RK: Tensor, RL: Tensor) -> Tensor:
    """A tangent matrix in the augmented bases [U | U~], [V | V~], from its parts there.

    [[ U^T M V,  U^T M V~ ], [ U~^T M V,  0 ]], (*batch, 2r, 2r). The lower right block of a tangent
    matrix is zero by construction.

    Args:
        RK: [U | U~]^T K (*batch, 2r, r).
        RL: [V | V~]^T L (*batch, 2r, r).

    Source: GeoLoRA, arXiv 2410.18720, the coefficient matrix before truncation.
    """
    r = RK.shape[-1]
    rest = torch.cat([RL[..., r:, :].mT, torch.zeros_like(RK[..., r:, :])], dim=-2)
    return torch.cat([RK, rest], dim=-1)


Factors = tuple[Tensor, Tensor]
"""A (*batch, r, d_in) and B (*batch, d_out, r) of W = s B A."""


def predicted_decrease(before: Factors, after: Factors, grads: Factors) -> Tensor:
    """<P(W)G, W - W+> (*batch,): how far the loss falls from W to W+, to first order; float64.

    For a step inside the tangent space at W that is <G, W - W+>. The projection comes from the factors'
    gradients alone, whatever the gauge: U U^T G = B (B^T B)^+ grad_A / s, G V V^T = grad_B (A A^T)^+ A / s.

    Args:
        before, after: factors of W and of W+, of the same s.
        grads: of the loss with respect to A and B, at W; s is in them.
    """
    (A, B), (grad_A, grad_B) = _double(before), _double(grads)
    left, right = _pseudo_inverse(B.mT @ B), _pseudo_inverse(A @ A.mT)
    of_both = left @ (B.mT @ grad_B) @ right

    def along(other: Factors) -> Tensor:  # <P(W)G, s other_B other_A>
        other_A, other_B = _double(other)
        from_left, from_right = B.mT @ other_B, A @ other_A.mT
        seen_left = left @ (grad_A @ other_A.mT) * from_left
        seen_right = (grad_B.mT @ other_B) * (right @ from_right)
        return (seen_left + seen_right - (of_both @ from_right) * from_left).sum((-2, -1))

    return along(before) - along(after)


def distance(before: Factors, after: Factors, scale: Tensor) -> Tensor:
    """||W+ - W||_F (*batch,), float64, of two pairs with the same s (*batch,)."""
    both = [_double(before), _double(after)]
    A, B = torch.cat([A for A, _ in both], -2), torch.cat([both[0][1], -both[1][1]], -1)
    return scale.double() * ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0).sqrt()


def _double(factors: Factors) -> Factors:
    A, B = factors
    return A.double(), B.double()


def _pseudo_inverse(gram: Tensor) -> Tensor:
    """Of Gram matrices (*batch, r, r) in float64; eigenvalues below 1e-12 of the largest count as zero."""
    return torch.linalg.pinv(gram, rtol=1e-12, hermitian=True)
