"""AdamW on preconditioned factor gradients: `RiemannianAdamW`.

Pairs are found by position in the param groups, [A1, B1, A2, B2, …], one group per shape, so what swaps the
Parameter objects of a group (FSDP2) is followed. The state is AdamW's, beside each factor.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from geolora.buckets import by_shape, pairs_of
from geolora.errors import SettingError, SetupError, UnpairedParametersWarning, at_most_three
from geolora.finite import to_be_skipped, total
from geolora.methods.riemannian import precondition
from geolora.pairs import find_pairs, refuse_frozen, unpaired_lora_layers
from geolora.rest import SETTINGS, adamw_step


class RiemannianAdamW(torch.optim.Optimizer):
    """AdamW on LoRA's factor gradients in the metric of the other factor, for any LoRA pairs.

    grad_A becomes (B^T B + damping I)^-1 grad_A and grad_B becomes grad_B (A A^T + damping I)^-1, both of the
    pair before the step. All layers of a shape are solved together. MoE experts (`target_parameters`) are
    taken as the separate pairs they are.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs.py`).
        lr: AdamW's step size for the factors.
        rest_lr: that for everything else that is trainable.
        damping: above 0; what keeps a solve from blowing up while a factor is small (B starts at 0).
        betas, eps, weight_decay: AdamW's, for the factors.
        adapter_name: which adapter of the model; None for the active one.

    Raises:
        PairingError: no pair, or a layer that cannot be treated.
        SettingError: an argument out of its range.
        SetupError: partitioned or sharded factors; a closure given to `step`.
        NonFiniteGradientError: 20 steps in a row without a finite gradient.

    Source: arXiv 2402.02347; as an option of LoRA-One, arXiv 2502.01235.

    Example:
        >>> optimizer = RiemannianAdamW(model, lr=1e-3)     # doctest: +SKIP
    """

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
        for name, value in (("lr", lr), ("rest_lr", rest_lr), ("weight_decay", weight_decay)):
            _demand(name, value, value >= 0 and math.isfinite(value), "a number >= 0")
        for name, value in (("damping", damping), ("eps", eps)):
            _demand(name, value, value > 0 and math.isfinite(value), "a number > 0")
        _demand("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        pairs = find_pairs(model, adapter_name, with_experts=True)
        refuse_frozen(pairs)
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        groups: list[dict[str, Any]] = [
            {
                **SETTINGS,
                **own,
                "kind": "pairs",
                "params": [p for pair in bucket for p in (pair.A, pair.B)],
                "layers": [pair.name for pair in bucket],
                "experts": bucket[0].experts,
                "damping": damping,
                "skipped": 0,
            }
            for bucket in by_shape(pairs)
        ]
        paired = {id(p) for group in groups for p in group["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
        if rest:
            groups.append({**SETTINGS, "params": rest, "lr": rest_lr})
        if unpaired := unpaired_lora_layers(model, adapter_name):
            warnings.warn(
                f"RiemannianAdamW: LoRA on embeddings is not preconditioned: {at_most_three(unpaired)}.",
                UnpairedParametersWarning,
                stacklevel=2,
            )
        super().__init__(groups, {"lr": lr, "rest_lr": rest_lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; one with a gradient that is not finite is skipped as a whole."""
        if closure is not None:
            raise SetupError(
                "RiemannianAdamW.step: closures are not supported. Compute the loss and call "
                "backward() before step()."
            )
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if to_be_skipped(
            "RiemannianAdamW", self.param_groups[0], [total(grad) for grad in grads], self._culprits
        ):
            return
        for group in self.param_groups:
            if group["kind"] == "pairs":
                adamw_step(group, self.state, list(_preconditioned(group)), fused=_can_fuse(group))
            else:
                adamw_step(group, self.state)

    def _culprits(self) -> list[str]:
        return [
            name
            for group in self.param_groups
            if group["kind"] == "pairs"
            for name, pair in zip(group["layers"], pairs_of(group["params"]), strict=True)
            if any(p.grad is not None and not p.grad.isfinite().all() for p in pair)
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters for AdamW; pairs are found when the optimizer is built, not here."""
        if "kind" not in param_group:
            param_group = {**SETTINGS, "lr": self.defaults["rest_lr"], **param_group}
        super().add_param_group(param_group)


def _preconditioned(group: dict[str, Any]) -> Iterable[Tensor]:
    """The preconditioned gradients of a bucket, for its parameters that have one."""
    pairs = list(pairs_of(group["params"]))
    live = [pair for pair in pairs if any(p.grad is not None for p in pair)]
    if not live:
        return
    dtype = torch.promote_types(live[0][0].dtype, torch.float32)
    count = group["experts"]

    def stacked(side: int, grads: bool) -> Tensor:
        """(pairs * experts, r, d_in) of A, or (pairs * experts, d_out, r) of B."""
        parts = []
        for pair in live:
            p = pair[side]
            part = p if not grads else torch.zeros_like(p) if p.grad is None else p.grad
            parts.append(part.flatten(1))
        whole = torch.stack(parts).to(dtype)
        if side == 0:
            return whole.unflatten(1, (count, -1)).flatten(0, 1)
        return whole.unflatten(-1, (-1, count)).movedim(-1, 1).flatten(0, 1)

    A, B = stacked(0, grads=False), stacked(1, grads=False)
    on_A, on_B = precondition(
        A, B, stacked(0, grads=True), stacked(1, grads=True), group["damping"]
    )
    on_A = on_A.unflatten(0, (-1, count)).flatten(1, 2)
    on_B = on_B.unflatten(0, (-1, count)).movedim(1, -1).flatten(-2)
    for pair, parts in zip(live, zip(on_A, on_B, strict=True), strict=True):
        for p, part in zip(pair, parts, strict=True):
            if p.grad is not None:
                yield part.to(p.grad.dtype).reshape(p.shape)


def _can_fuse(group: dict[str, Any]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])


def _demand(name: str, value: object, met: bool, condition: str) -> None:
    if not met:
        raise SettingError(f"RiemannianAdamW: `{name}` must be {condition}; got {value!r}.")
