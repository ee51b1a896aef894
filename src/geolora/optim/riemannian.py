"""`RiemannianAdamW`; the mathematics is in `methods/riemannian.py`."""

from typing import Any

from torch import Tensor, nn

from geolora.methods.riemannian import precondition
from geolora.optim.adamw import adamw_of_stacks, moments
from geolora.optim.base import BucketwiseOptimizer
from geolora.optim.buckets import stacked_factors, write_back
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import find_pairs


class RiemannianAdamW(BucketwiseOptimizer):
    """AdamW on LoRA's factor gradients in the metric of the other factor, for any LoRA pairs.

    grad_A becomes (B^T B + damping I)^-1 grad_A and grad_B becomes grad_B (A A^T + damping I)^-1, both of the
    pair before the step. All layers of a shape are solved together. MoE experts (`target_parameters`) are
    taken as the separate pairs they are.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs/find.py`).
        lr: AdamW's step size for the factors.
        rest_lr: that for everything else that is trainable.
        damping: above 0; what keeps a solve from blowing up while a factor is small (B starts at 0).
        betas, eps, weight_decay: AdamW's, for the factors.
        adapter_name: which adapter of the model; None for the active one.

    Precision:
        Solves are float64, of Gram matrices in the dtype of the factors, float32 at least (on CUDA float64); a
        damping below their rounding is raised to it. Moments are float32 or wider. The factors are rounded
        to their dtype in every step: keep them in float32 (PEFT's default), also over a bf16 base.

    Raises:
        PairingError: no pair, or a layer that cannot be treated.
        SettingError: an argument out of its range.
        SetupError: factors that ZeRO has partitioned; a closure given to `step`.
        StateError: a factor that was reshaped, cast or moved between steps; a state of another model.
        NonFiniteGradientError: 20 steps in a row without a finite gradient.

    Source: arXiv 2402.02347; as an option of LoRA-One, arXiv 2502.01235.

    Examples:
        >>> optimizer = RiemannianAdamW(model, lr=1e-3)     # doctest: +SKIP
    """

    method = "riemannian"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        rest_lr: float = 1e-3,
        damping: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adapter_name: str | None = None,
    ) -> None:
        self._number("damping", damping, "a number > 0", lambda v: v > 0)
        self._number("weight_decay", weight_decay, "a number >= 0", lambda v: v >= 0)
        self._demand_adams(betas, eps)
        settings = {
            "lr": lr,
            "damping": damping,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        pairs = find_pairs(model, adapter_name, with_experts=True, with_sharded=True)
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:  # noqa: ARG002
        A, B = group["params"][:2]
        n, r = len(group["layers"]), A.shape[0]
        A_like, B_like = (n, r, A[0].numel()), (n, B.shape[0], r)
        return {
            "exp_avg_A": A_like,
            "exp_avg_B": B_like,
            "exp_avg_sq_A": A_like,
            "exp_avg_sq_B": B_like,
        }

    def _advance(
        self, group: dict[str, Any], grad_A: Tensor, grad_B: Tensor, live: list[bool]
    ) -> None:
        state, factors = self.state[group["params"][0]], stacked_factors(group)
        grads = _preconditioned(group, *factors, grad_A, grad_B)
        means = moments(state, ("exp_avg_A", "exp_avg_B"), grads)
        squares = moments(state, ("exp_avg_sq_A", "exp_avg_sq_B"), grads)
        adamw_of_stacks(group, factors, grads, means, squares, live)
        for side, values in enumerate(factors):
            write_back(group["params"][side::2], values)


def _preconditioned(
    group: dict[str, Any], A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The preconditioned gradients of a bucket, like grad_A (n, r, d_in) and grad_B (n, d_out, r)."""
    count = group["experts"]

    def of_experts(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(n * experts, r, d_in) and (n * experts, d_out, r)."""
        A = A.unflatten(1, (count, -1)).flatten(0, 1)
        return A, B.unflatten(-1, (-1, count)).movedim(-1, 1).flatten(0, 1)

    grad_A, grad_B = precondition(*of_experts(A, B), *of_experts(grad_A, grad_B), group["damping"])
    grad_A = grad_A.unflatten(0, (-1, count)).flatten(1, 2)
    grad_B = grad_B.unflatten(0, (-1, count)).movedim(1, -1).flatten(-2)
    return grad_A.contiguous(), grad_B.contiguous()
