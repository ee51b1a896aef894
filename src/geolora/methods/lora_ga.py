"""LoRA-GA: a start whose first step moves W along the leading singular directions of the gradient.

Paper: Wang, Yu, Li, "LoRA-GA: Low-rank adaptation with gradient approximation", arXiv 2407.05000 (NeurIPS 2024).
What this file computes: A0 = c V_{1..h}^T, B0 = c U_{h+1..2h}, c = d_out^(1/4) / sqrt(gamma); the product is
    taken away again by further slots that stay as they are.
Symbols: U, V = leading singular vectors of G = dL/dW, 2h of them; h = slots that are trained.
Differences from the authors' code: theirs subtracts s B0 A0 from the base weights, which then have to be saved,
    converted, and cannot be quantised; here it is -B0 and A0 in h more slots of the same pair.
    PEFT's `lora_ga` multiplies B by the gradient's singular values; the authors do not, nor does this.
Defaults: gamma = 16, the authors'.
"""

import torch
from torch import Tensor


def start(U: Tensor, V: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """A pair of 2h slots with B A = 0, of which the first h are to be trained and the others kept.

    The first step of descent on those moves B A by -lr c^2 times the best rank-2h part of G.

    Args:
        U, V: (d_out, 2h), (d_in, 2h). gamma: above 0.

    Returns:
        A (2h, d_in) and B (d_out, 2h).
    """
    half = U.shape[-1] // 2
    size = U.shape[0] ** 0.25 / gamma**0.5
    A, B = size * V[:, :half].mT, size * U[:, half : 2 * half]
    return torch.cat([A, A]), torch.cat([B, -B], dim=-1)
