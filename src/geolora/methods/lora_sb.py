"""LoRA-SB: fixed bases from the gradient, only the r x r core between them is trained.

Paper: Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma, "Initialization using update
    approximation is a silver bullet for extremely efficient low-rank fine-tuning", arXiv 2411.19557.
What this file computes: W = U R V^T in an unmodified pair, A = V^T and B = U R / s, and dL/dR = U^T G V.
Symbols: U, V = leading singular vectors of G = dL/dW before training, never changed; R = the core.
Differences from the authors' code: R starts from G itself, not from the sign of its sum, which would need
    the whole matrix; no layer is replaced; U and R are float32, whatever the factors are.
Defaults: the length of the start is LoRA-One's, from geolora.starts.step_length.
"""

from torch import Tensor


def start(U: Tensor, sigma: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The pair A = V^T (r, d_in), B = U diag(sigma) / s (d_out, r)."""
    return V.mT, U * sigma / scale


def core_gradient(U: Tensor, grad_B: Tensor, scale: Tensor) -> Tensor:
    """dL/dR = U^T G V = U^T grad_B / s, since grad_B = s G A^T and A = V^T.

    Args:
        U, grad_B: (*batch, d_out, r). scale: (*batch,).

    Returns:
        (*batch, r, r).
    """
    return U.mT @ grad_B / scale.view(*scale.shape, 1, 1)
