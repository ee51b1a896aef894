"""`LoRAMuon`; the mathematics is in `methods/lora_muon.py`."""

from typing import Any

from torch import Tensor, nn

from geolora.methods import lora_muon
from geolora.optim.adamw import moments, move_average
from geolora.optim.base import BucketwiseOptimizer
from geolora.optim.buckets import scales_of, stacked_factors, write_back
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import find_pairs


class LoRAMuon(BucketwiseOptimizer):
    """Steepest descent of W under the spectral norm, half of it by each of LoRA's factors.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs/find.py`).
        lr: spectral norm of a step's change of W, half of it by B and half by A, whatever lora_alpha is.
        rest_lr: AdamW's step size for everything else that is trainable.
        momentum: of the average of each factor's gradients, in [0, 1).
        decay: share of W that is lost per step and lr; decay * lr / s must be below 1, s being LoRA's scale.
        adapter_name: which adapter of the model; None for the active one.

    Precision:
        Averages are float32 (float64 for float64 pairs), what is computed from them float64. The factors
        are rounded to their dtype in every step: keep them in float32 (PEFT's default).

    Raises:
        GeoloraError: as `RiemannianAdamW`.

    Source: arXiv 2606.12921.

    Examples:
        >>> optimizer = LoRAMuon(model)                     # doctest: +SKIP
    """

    method = "lora-muon"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-2,
        *,
        rest_lr: float = 1e-3,
        momentum: float = 0.9,
        decay: float = 0.01,
        adapter_name: str | None = None,
    ) -> None:
        self._number("lr", lr, "a number >= 0", lambda v: v >= 0)
        self._number("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)
        self._number("decay", decay, "a number >= 0", lambda v: v >= 0)
        pairs = find_pairs(model, adapter_name, with_sharded=True)
        least = min(pair.scale for pair in pairs)
        self._demand("decay", decay, decay * lr < least, f"below LoRA's scale / lr, {least} / {lr}")
        settings = {"lr": lr, "momentum": momentum, "decay": decay}
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:  # noqa: ARG002
        A, B = group["params"][:2]
        n, r = len(group["layers"]), A.shape[0]
        return {"mean_A": (n, r, A[0].numel()), "mean_B": (n, B.shape[0], r)}

    def _advance(
        self, group: dict[str, Any], grad_A: Tensor, grad_B: Tensor, live: list[bool]
    ) -> None:
        state, (A, B) = self.state[group["params"][0]], stacked_factors(group)
        means = moments(state, ("mean_A", "mean_B"), (grad_A, grad_B))
        for mean, grad in zip(means, (grad_A, grad_B), strict=True):
            move_average(mean, grad, group["momentum"], live)
        if group["lr"] == 0:
            return
        moved = lora_muon.step(
            A,
            B,
            *lora_muon.directions(A, B, *means),
            group["lr"] / scales_of(group, A),
            group["decay"],
        )
        for side, values in enumerate(moved):
            write_back(group["params"][side::2], values)
