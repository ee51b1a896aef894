"""Riemannian preconditioned LoRA: factor gradients in the metric that the other factor gives.

Paper: Zhang, Pilanci, "Riemannian preconditioned LoRA for fine-tuning foundation models",
    arXiv 2402.02347 (ICML 2024). The same preconditioner is LoRA-One's (arXiv 2502.01235, algorithm 1).
What this file computes: grad_A' = (B^T B + damping I)^-1 grad_A, grad_B' = grad_B (A A^T + damping I)^-1.
Differences from the authors' code: both sides see the pair as it was before the step (theirs takes
    the new A for B); a damped solve never falls back to the identity.
Defaults: damping 1e-2, as in PEFT; the authors tune it over eight decades.
"""

import torch
from torch import Tensor

from geolora.kernels.solve import damped_inverse


def precondition(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The preconditioned gradients of LoRA pairs W = s B A.

    A step -lr / s^2 of them moves W by lr times U U^T G + G V V^T, U and V bases of the columns of B and
    the rows of A, as damping -> 0: whatever the singular values of W. LoRA's scale s is not divided
    out here; behind Adam it does not matter.

    Args:
        A, grad_A: (*batch, r, d_in). B, grad_B: (*batch, d_out, r).
        damping: above 0.

    Returns:
        Two tensors like grad_A and grad_B.
    """
    wide = torch.float64 if A.is_cuda else A.dtype  # on CUDA, float32 products may be TF32's
    rows, columns = A.to(wide), B.to(wide)
    grams = torch.stack([columns.mT @ columns, rows @ rows.mT])
    of_A, of_B = damped_inverse(grams, damping).to(grad_A.dtype)
    return of_A @ grad_A, grad_B @ of_B
