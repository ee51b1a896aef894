"""LoRA-Muon: each factor moves so that all singular values of its part of the step are equal.

Paper: "LoRA-Muon", arXiv 2606.12921, as its equations are quoted publicly; no code is known.
What this file computes: the steepest descent of W = s B A under the spectral norm, half of it by each factor:
    D_B = msign(m_B R_A) R_A,    D_A = R_B msign(R_B m_A),    R_A = (A A^T)^-1/2,  R_B = (B^T B)^-1/2,
    so that ||D_B A||_2 = ||B D_A||_2 = 1; then X <- c X - (lr / 2 s) D_X / c with c = sqrt(1 - decay lr).
Symbols: m_A, m_B = averages of the factors' gradients; msign(X) = P Q^T for X = P diag(t) Q^T.
Differences: roots and signs by eigenvalues in float64 instead of 7 and 8 iterations; pseudo-inverses, so that
    B = 0 is an ordinary point (D_A = 0 there); lr is per W, whatever LoRA's scale s.
Defaults: momentum (the paper's beta) 0.9 and decay 0.01 as in the paper; lr measured (docs/decisions.md).
"""

import torch
from torch import Tensor

from geolora.kernels.decompose import eigh

NOTHING = 1e-12
"""Eigenvalues of A A^T or B^T B below this part of the largest belong to no direction: singular values below 1e-6."""


def directions(A: Tensor, B: Tensor, m_A: Tensor, m_B: Tensor) -> tuple[Tensor, Tensor]:
    """D_A and D_B of LoRA pairs.

    D_B A and B D_A do not depend on the gauge (R A, B R^-1) of the pair, where the averages are those of one
    gradient, nor on the loss's scale.

    Args:
        A, m_A: (*batch, r, d_in). B, m_B: (*batch, d_out, r).

    Returns:
        Two tensors like A and B, float64; zero where the average, or the other factor, is.
    """
    A, B, m_A, m_B = (tensor.double() for tensor in (A, B, m_A, m_B))
    root_A, root_B = _inverse_root(A @ A.mT), _inverse_root(B.mT @ B)
    return root_B @ sign(root_B @ m_A), sign(m_B @ root_A) @ root_A


def step(
    A: Tensor, B: Tensor, D_A: Tensor, D_B: Tensor, lr: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """The pairs after a step: W decays by lr * decay and moves by lr / 2 for each factor.

    Args:
        lr: (*batch,), step size of each pair over its s: change of B A, not of W; decay * lr below 1.
    """
    lr = lr.double().view(*lr.shape, 1, 1)
    c = (1 - decay * lr).sqrt()
    return c * A.double() - lr / 2 * D_A / c, c * B.double() - lr / 2 * D_B / c


def sign(X: Tensor) -> Tensor:
    """msign(X), (*batch, m, n), float64: singular values above the cutoff become 1, the others 0."""
    if X.shape[-2] < X.shape[-1]:
        return sign(X.mT).mT
    return X @ _inverse_root(X.mT @ X)


def _inverse_root(gram: Tensor) -> Tensor:
    """gram^-1/2 on what the columns span, zero elsewhere."""
    values, vectors = eigh(gram)
    real = values > NOTHING * values[..., -1:].clamp(min=0)
    root = torch.where(real, values, 1.0).rsqrt() * real
    return (vectors * root.unsqueeze(-2)) @ vectors.mT
