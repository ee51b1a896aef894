"""`LoRAPro`; the mathematics is in `methods/lora_pro.py`."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from geolora.methods import lora_pro
from geolora.optim.adamw import adam_direction, moments, move_average, unbiased
from geolora.optim.base import BucketwiseOptimizer
from geolora.optim.buckets import scales_of, stacked_factors, write_back
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import find_pairs


class LoRAPro(BucketwiseOptimizer):
    """Descent on LoRA's factors whose effect on W is Adam's on the projected gradient P(W)G.

    Adam's direction N is made in W space, from moments of P(W)G = U U^T G + G V V^T - U U^T G V V^T; then the
    factors move so that W moves by -lr P(W)N to first order, and as little else as possible.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs/find.py`).
        lr: change of the entries of W in a step, about; the same unit as Adam's in full fine-tuning.
        rest_lr: AdamW's step size for everything else that is trainable.
        moments: "tangent" (state of an adapter's size: the first moment stays in the tangent space, the
            second is kept by row and column means) or "full" (the paper's: two matrices of W's size per layer).
        betas: Adam's. eps: Adam's, for moments="full".
        ridge: what is added to B^T B and A A^T, 0 or more; the authors' 1e-8.
        adapter_name: which adapter of the model; None for the active one.

    Precision:
        Moments are float32 (float64 for float64 pairs), what is computed from them float64. The factors
        are rounded to their dtype in every step: keep them in float32 (PEFT's default).

    Raises:
        GeoloraError: as `RiemannianAdamW`.

    Source: arXiv 2407.18242, theorem 2.1 and algorithm 1; "tangent" is ours.

    Examples:
        >>> optimizer = LoRAPro(model)                      # doctest: +SKIP
    """

    method = "lora-pro"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        *,
        rest_lr: float = 1e-3,
        moments: str = "tangent",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ridge: float = lora_pro.RIDGE,
        adapter_name: str | None = None,
    ) -> None:
        self._number("ridge", ridge, "a number >= 0", lambda v: v >= 0)
        forms = ("tangent", "full")
        self._demand("moments", moments, moments in forms, f"one of {forms}")
        self._demand_adams(betas, eps)
        settings = {"lr": lr, "moments": moments, "betas": betas, "eps": eps, "ridge": ridge}
        pairs = find_pairs(model, adapter_name, with_sharded=True)
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:
        A, B = group["params"][:2]
        n, r, d_in, d_out = len(group["layers"]), A.shape[0], A[0].numel(), B.shape[0]
        if saved["moments"] == "full":
            return dict.fromkeys(("exp_avg", "exp_avg_sq"), (n, d_out, d_in))
        return {
            "on_A": (n, r, d_in),
            "on_B": (n, d_out, r),
            "rows": (n, d_out),
            "columns": (n, d_in),
        }

    def _advance(
        self, group: dict[str, Any], grad_A: Tensor, grad_B: Tensor, live: list[bool]
    ) -> None:
        A, B = stacked_factors(group)
        scale = scales_of(group, A)
        s = scale.view(-1, 1, 1)
        gradient = lora_pro.Projections(grad_A / s, grad_B / s)
        here = _Here(A, B, gradient, lora_pro.metric(A, B, group["ridge"]))
        state = self.state[group["params"][0]]
        full = group["moments"] == "full"
        direction = (_full if full else _tangent)(group, state, here, live)
        g_A, g_B = lora_pro.factor_gradients(A, B, direction, scale, here.metric)
        new_A, new_B = A - group["lr"] * g_A, B - group["lr"] * g_B
        for side, new in enumerate((new_A, new_B)):
            write_back(group["params"][side::2], new)
        if not full:
            mean = lora_pro.Projections(state["on_A"], state["on_B"])
            rounded = stacked_factors(group)  # to the dtype of the factors
            state["on_A"], state["on_B"] = lora_pro.carried(A, B, mean, *rounded, here.metric)


class _Here(NamedTuple):
    """The pairs of a bucket, the gradient there, and the metric."""

    A: Tensor
    B: Tensor
    gradient: lora_pro.Projections
    metric: lora_pro.Metric


def _tangent(
    group: dict[str, Any], state: dict[str, Any], here: _Here, live: list[bool]
) -> lora_pro.Projections:
    """Adam's direction N by its projections; the first moment is in `on_A` and `on_B` of the state."""
    A, B, gradient, metric = here
    now = lora_pro.mean_squares(A, B, gradient, metric)
    moments(state, ("on_A", "on_B", "rows", "columns"), (*gradient, *now))
    first, second = group["betas"]
    for key, side in zip(("on_A", "on_B"), gradient, strict=True):
        move_average(state[key], side, first, live)
    for key, square in zip(("rows", "columns"), now, strict=True):
        move_average(state[key], square, second, live)
    mean = lora_pro.Projections(state["on_A"], state["on_B"])
    squares = lora_pro.Squares(
        *(state[key] / unbiased(group, second, state[key]) for key in ("rows", "columns"))
    )
    N = lora_pro.normalised(A, B, mean, squares, metric)
    share = 1 / unbiased(group, first, A)
    return lora_pro.Projections(share * N.on_A, share * N.on_B)


def _full(
    group: dict[str, Any], state: dict[str, Any], here: _Here, live: list[bool]
) -> lora_pro.Projections:
    """Adam's direction N by its projections; moments of W's size."""
    gradient = lora_pro.dense(here.A, here.B, here.gradient, here.metric)
    N = adam_direction(state, gradient, group, live)
    return lora_pro.projections_of(N, here.A, here.B)
