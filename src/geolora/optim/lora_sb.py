"""`LoRASB`; the mathematics is in `methods/lora_sb.py`."""

from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import SetupError
from geolora.methods import lora_sb
from geolora.optim.base import Pairwise, adam, stacked
from geolora.optim.buckets import pairs_of, scales_of
from geolora.pairs.find import find_pairs


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
        GeoloraError: as `RiemannianAdamW`; SetupError also in the first step where B is zero or the rows of A are not orthonormal.

    Source: arXiv 2411.19557.

    Examples:
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
