"""GeoLoRA's relatives as optimizers: `RiemannianAdamW`, `LoRAPro`, `LoRASB`, `RACLoRA`; the mathematics is in `methods/`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from geolora.buckets import pairs_of, scales_of
from geolora.errors import SetupError
from geolora.methods import lora_pro, lora_sb, rac_lora
from geolora.methods.riemannian import precondition
from geolora.pairs import find_pairs
from geolora.pairwise import (
    Pairwise,
    adam,
    adamw_of_stacks,
    moments,
    move_average,
    stacked,
    unbiased,
    write_back,
)
from geolora.rest import SETTINGS, adamw_step


class RiemannianAdamW(Pairwise):
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

    Precision:
        Solves are float64, of Gram matrices in the dtype of the factors, float32 at least (on CUDA float64); a
        damping below their rounding is raised to it. Moments are float32 or wider. The factors are rounded
        to their dtype in every step: keep them in float32 (PEFT's default), also over a bf16 base.

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
        self._demand("damping", damping, damping > 0 and math.isfinite(damping), "a number > 0")
        self._demand("weight_decay", weight_decay, weight_decay >= 0, "a number >= 0")
        own = {
            "lr": lr,
            "damping": damping,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        pairs = find_pairs(model, adapter_name, with_experts=True)
        super().__init__(model, pairs, own, rest_lr, adapter_name)

    def _advance(self, group: dict[str, Any], on_A: Tensor, on_B: Tensor, live: list[bool]) -> None:
        state, factors = self.state[group["params"][0]], stacked(group)
        grads = _preconditioned(group, *factors, on_A, on_B)
        means = moments(state, ("exp_avg_A", "exp_avg_B"), grads)
        squares = moments(state, ("exp_avg_sq_A", "exp_avg_sq_B"), grads)
        adamw_of_stacks(group, factors, grads, means, squares, live)
        for side, values in enumerate(factors):
            write_back(group["params"][side::2], values)


def _preconditioned(
    group: dict[str, Any], A: Tensor, B: Tensor, on_A: Tensor, on_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The preconditioned gradients of a bucket, like on_A (n, r, d_in) and on_B (n, d_out, r)."""
    count = group["experts"]

    def of_experts(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(n * experts, r, d_in) and (n * experts, d_out, r)."""
        A = A.unflatten(1, (count, -1)).flatten(0, 1)
        return A, B.unflatten(-1, (-1, count)).movedim(-1, 1).flatten(0, 1)

    on_A, on_B = precondition(*of_experts(A, B), *of_experts(on_A, on_B), group["damping"])
    on_A = on_A.unflatten(0, (-1, count)).flatten(1, 2)
    on_B = on_B.unflatten(0, (-1, count)).movedim(1, -1).flatten(-2)
    return on_A.contiguous(), on_B.contiguous()


class LoRAPro(Pairwise):
    """Descent on LoRA's factors whose effect on W is Adam's on the projected gradient P(W)G.

    Adam's direction N is made in W space, from moments of P(W)G = U U^T G + G V V^T - U U^T G V V^T; then the
    factors move so that W moves by -lr P(W)N to first order, and as little else as possible.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs.py`).
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
        As `RiemannianAdamW`.

    Source: arXiv 2407.18242, theorem 2.1 and algorithm 1; "tangent" is ours.

    Example:
        >>> optimizer = LoRAPro(model)                      # doctest: +SKIP
    """

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
        self._demand("ridge", ridge, ridge >= 0 and math.isfinite(ridge), "a number >= 0")
        forms = ("tangent", "full")
        self._demand("moments", moments, moments in forms, f"one of {forms}")
        own = {
            "lr": lr,
            "moments": moments,
            "betas": betas,
            "eps": eps,
            "ridge": ridge,
        }
        super().__init__(model, find_pairs(model, adapter_name), own, rest_lr, adapter_name)

    def _advance(self, group: dict[str, Any], on_A: Tensor, on_B: Tensor, live: list[bool]) -> None:
        A, B = stacked(group)
        scale = scales_of(group, A)
        s = scale.view(-1, 1, 1)
        seen = lora_pro.Parts(on_A / s, on_B / s)
        at = lora_pro.metric(A, B, group["ridge"])
        state = self.state[group["params"][0]]
        step = self._full if group["moments"] == "full" else self._tangent
        parts, mean = step(group, state, A, B, seen, at, live)
        g_A, g_B = lora_pro.factor_gradients(A, B, parts, scale, at)
        new_A, new_B = A - group["lr"] * g_A, B - group["lr"] * g_B
        for side, new in enumerate((new_A, new_B)):
            write_back(group["params"][side::2], new)
        if mean is not None:
            written = stacked(group)  # as rounded to the dtype of the factors
            state["on_A"], state["on_B"] = lora_pro.carried(A, B, mean, *written, at)

    @staticmethod
    def _tangent(
        group: dict[str, Any],
        state: dict[str, Any],
        A: Tensor,
        B: Tensor,
        seen: lora_pro.Parts,
        at: lora_pro.Metric,
        live: list[bool],
    ) -> tuple[lora_pro.Parts, lora_pro.Parts]:
        """N by its parts, and the first moment."""
        now = lora_pro.mean_squares(A, B, seen, at)
        moments(state, ("on_A", "on_B", "rows", "columns"), (*seen, *now))
        first, second = group["betas"]
        for key, part in zip(("on_A", "on_B"), seen, strict=True):
            move_average(state[key], part, first, live)
        for key, part in zip(("rows", "columns"), now, strict=True):
            move_average(state[key], part, second, live)
        mean = lora_pro.Parts(state["on_A"], state["on_B"])
        squares = lora_pro.Squares(
            *(state[key] / unbiased(group, second, state[key]) for key in ("rows", "columns"))
        )
        N = lora_pro.normalised(A, B, mean, squares, at)
        share = 1 / unbiased(group, first, A)
        return lora_pro.Parts(share * N.on_A, share * N.on_B), mean

    @staticmethod
    def _full(
        group: dict[str, Any],
        state: dict[str, Any],
        A: Tensor,
        B: Tensor,
        seen: lora_pro.Parts,
        at: lora_pro.Metric,
        live: list[bool],
    ) -> tuple[lora_pro.Parts, None]:
        """N by its parts."""
        N = adam(state, lora_pro.dense(A, B, seen, at), group, live)
        return lora_pro.parts_of(N, A, B), None


class LoRASB(Pairwise):
    """LoRA-SB: Adam on the r x r cores R of W = U R V^T; the bases stay those of the start.

    A = V^T is never written, B is kept at U R / s. Call `initialize_lora_sb` first.

    Args:
        model: a PeftModel after `initialize_lora_sb`.
        lr: Adam's step size for the entries of R, in units of W.
        rest_lr: AdamW's step size for everything else that is trainable.
        betas, eps: Adam's.
        adapter_name: which adapter of the model; None for the active one.

    Raises:
        As `RiemannianAdamW`; SetupError also in the first step where B is zero or the rows of A are not orthonormal.

    Source: arXiv 2411.19557.

    Example:
        >>> geolora.initialize_lora_sb(model, batches)      # doctest: +SKIP
        >>> optimizer = LoRASB(model)                       # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        rest_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapter_name: str | None = None,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "steps": 0}
        super().__init__(model, find_pairs(model, adapter_name), own, rest_lr, adapter_name)

    def _advance(
        self,
        group: dict[str, Any],
        on_A: Tensor,  # noqa: ARG002
        on_B: Tensor,
        live: list[bool],
    ) -> None:
        pairs = list(pairs_of(group["params"]))
        state, (A, B) = self.state[group["params"][0]], stacked(group)
        scale = scales_of(group, A)
        s = scale.view(-1, 1, 1)
        self._read(state, group["counts"], pairs, B, s)
        live = [
            on and b.grad is not None and bool(b.any())
            for on, (_, b) in zip(live, pairs, strict=True)
        ]
        grad = lora_sb.core_gradient(state["U"], on_B, scale)
        group["steps"] += 1
        move = group["lr"] * adam(state, grad, group, live)
        if group["lr"] == 0:
            return
        for i, (_, b) in enumerate(pairs):
            if live[i]:
                state["R"][i] -= move[i]
                b.copy_((state["U"][i] @ state["R"][i] / s[i]).reshape(b.shape))

    @staticmethod
    def _read(
        state: dict[str, Any],
        counts: list[int],
        pairs: list[tuple[Tensor, Tensor]],
        B: Tensor,
        s: Tensor,
    ) -> None:
        """U and R of B = U R / s, where B is not what was written (a start, a reload); moments anew there."""
        if not state:
            for key, shape in (("U", B.shape), ("R", (len(B), *B.shape[-1:] * 2))):
                state[key] = B.new_zeros(shape)
        close = 100 * torch.finfo(pairs[0][1].dtype).eps
        apart = torch.linalg.matrix_norm(s * B - state["U"] @ state["R"])
        for i in (apart > close * torch.linalg.matrix_norm(s * B)).nonzero().flatten().tolist():
            U, values, Vt = torch.linalg.svd(s[i] * B[i], full_matrices=False)
            state["U"][i], state["R"][i] = U, values.unsqueeze(-1) * Vt
            counts[i] = 1
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key][i] = 0

    def _refuse(self, group: dict[str, Any]) -> None:
        if group["steps"]:
            return
        pairs = zip(group["layers"], *stacked(group), strict=True)
        for name, rows, columns in pairs:
            gram = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            if columns.any() and gram.abs().max() > 0.05:  # bf16 rows are within 0.01
                raise SetupError(
                    f"LoRASB: the rows of A of `{name}` must be orthonormal; they are not. Call "
                    "geolora.initialize_lora_sb(model, batches) first."
                )
        own = [p for g in self.param_groups if g["kind"] == "pairs" for p in g["params"][1::2]]
        if not any(bool(b.any()) for b in own):
            raise SetupError(
                "LoRASB: the pairs must have bases; B is zero in all of them. Call "
                "geolora.initialize_lora_sb(model, batches) first."
            )


class RACLoRA(Pairwise):
    """RAC-LoRA: train the columns of B block after block, against random rows of A that stay as they are.

    Over the usual start (B = 0, A random). Block t trains its slots from zero, with AdamW started anew; those
    of earlier blocks are frozen, and their sum is an ordinary adapter: `geolora.export(rank=)` cuts it.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs.py`); r slots are split over the blocks.
        steps_per_block: optimizer steps a block is trained for; the last goes on for ever. 1 or more.
        blocks: length of the chain, 1 to r.
        lr: AdamW's step size for the columns of B.
        rest_lr: that for everything else that is trainable.
        betas, eps: AdamW's.
        adapter_name: which adapter of the model; None for the active one.

    Raises:
        As `RiemannianAdamW`; SetupError also in the first step where B is not zero.

    Source: arXiv 2410.08305.

    Example:
        >>> optimizer = RACLoRA(model, steps_per_block=500) # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        steps_per_block: int,
        blocks: int = 4,
        lr: float = 1e-3,
        *,
        rest_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapter_name: str | None = None,
    ) -> None:
        pairs = find_pairs(model, adapter_name)
        most = min(pair.r for pair in pairs)
        self._demand("steps_per_block", steps_per_block, steps_per_block >= 1, "1 or more")
        self._demand("blocks", blocks, 1 <= blocks <= most, f"from 1 to the rank, {most}")
        own = {
            **SETTINGS,
            "kind": "pairs",
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "steps": 0,
            "steps_per_block": steps_per_block,
            "blocks": blocks,
        }
        super().__init__(model, pairs, own, rest_lr, adapter_name)

    def _advance(
        self,
        group: dict[str, Any],
        on_A: Tensor,  # noqa: ARG002
        on_B: Tensor,
        live: list[bool],  # noqa: ARG002
    ) -> None:
        count, blocks = group["steps_per_block"], group["blocks"]
        block = rac_lora.block_of(group["steps"], count, blocks)
        if group["steps"] and block != rac_lora.block_of(group["steps"] - 1, count, blocks):
            for p in group["params"]:
                self.state.pop(p, None)
        group["steps"] += 1
        first, last = rac_lora.slots_of(block, blocks, on_B.shape[-1])
        masked = torch.zeros_like(on_B)
        masked[..., first:last] = on_B[..., first:last]
        trained = group["params"][1::2]
        grads = [
            part.to(B.grad.dtype).reshape(B.shape)
            for B, part in zip(trained, masked, strict=True)
            if B.grad is not None
        ]
        adamw_step({**group, "params": trained}, self.state, grads)

    def _refuse(self, group: dict[str, Any]) -> None:
        for name, (_, B) in zip(group["layers"], pairs_of(group["params"]), strict=True):
            if not group["steps"] and B.any():
                raise SetupError(
                    f"RACLoRA: a chain starts from B = 0; that of `{name}` is not. Use LoRA's usual start."
                )
