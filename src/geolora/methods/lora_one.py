"""LoRA-One: an adapter that starts as one step of gradient descent, cut to its best rank.

Paper: Zhang, Liu, Chen, "LoRA-One: One-step full gradient could suffice for fine-tuning large language
    models, provably and efficiently", arXiv 2502.01235 (ICML 2025).
What this file computes: W0 = -norm * (G)_r / sigma_1, G = dL/dW before training, (.)_r the best rank-r part.
Symbols: U, sigma, V = leading singular triplets of G; norm = ||W0||_2.
Differences from the paper and the authors' code: the size is given in W, so LoRA's scale does not enter.
    The paper's final formula (gamma' = 1/s) is norm = 1; the published runs have norm = s / gamma =
    16 / sqrt(8) / 128 = 0.0442. The base weights are not touched, as in the paper.
Defaults: norm 0.05, or less where the loss says so: geolora.starts.step_length (docs/decisions.md).
"""

import torch
from torch import Tensor


def start(U: Tensor, sigma: Tensor, V: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """The start as a point U diag(sigma) V^T of spectral norm `norm`, along -G.

    Args:
        U, sigma, V: (d_out, r), (r,) descending, (d_in, r): leading singular triplets of G.
        norm: ||W0||_2 >= 0, in units of W.

    Returns:
        -U, norm * sigma / sigma_1, V. Directions below eps(float32) of sigma_1 are rounding: their
        sigma is zero. Where G = 0 all are.
    """
    first = sigma[..., :1]
    real = sigma > torch.finfo(torch.float32).eps * first
    shares = torch.where(real, sigma / torch.where(first > 0, first, torch.ones_like(first)), 0.0)
    return -U, norm * shares, V
